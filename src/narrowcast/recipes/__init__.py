"""Intent as data: budgets, targets, recipes and the plans that they become."""
