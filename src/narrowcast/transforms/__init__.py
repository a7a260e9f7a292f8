"""One file per method; ``apply`` finds the method of each step of a recipe."""
