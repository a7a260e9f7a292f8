"""Data references, the three-way split, and metrics."""
