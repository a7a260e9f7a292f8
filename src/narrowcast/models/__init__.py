"""Model references, loaders, and the graph that everything else reads."""
