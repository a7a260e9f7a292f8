"""The numerics doctor: where the numbers of a training broke, and what mends it."""
