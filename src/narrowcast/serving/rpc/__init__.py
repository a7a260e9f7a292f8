"""The Open Inference Protocol over gRPC, and the standard health service."""
