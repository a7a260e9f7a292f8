"""What a model costs, counted before anything runs."""
