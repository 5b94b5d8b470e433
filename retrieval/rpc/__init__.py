"""The gRPC service: transport-free answering, batching, reloading, server and client."""
