"""What a server and a client of the Open Inference Protocol, version 2, share: element types and gRPC messages."""
