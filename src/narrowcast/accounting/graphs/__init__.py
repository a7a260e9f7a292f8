"""ONNX graphs, counted by a walker of their own: without PyTorch, without weights, without running anything."""
