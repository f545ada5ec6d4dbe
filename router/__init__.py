"""The router: admission, placement, request lifecycle and the gRPC front door."""
