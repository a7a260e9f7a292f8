"""Training of the bundled digit network."""
