"""What the router decides, without gRPC, asyncio or a clock of its own."""
