"""Ways for pieces to travel between workers. `seam` is what they share; `grpc_*` is the complete default."""
