"""gRPC over HTTP/2 on an asyncio loop, for streams of many small messages.

The generated stubs and servicers are the ones of grpcio, and so is what travels: either side may be any gRPC
implementation. What is different is what a message costs: it is serialized, framed and joined with the others of
the same turn of the loop into one write (docs/adr/0015-http2-by-ourselves.md).

    frames.py      HTTP/2 frames
    heads.py       header lists of gRPC calls, their statuses and metadata
    messages.py    length-prefixed messages out of DATA frames
    stream.py      one stream's windows and buffers
    outbox.py      pure: what is sent, within the peer's windows
    head_reader.py header blocks read with the connection's table
    inbox.py       messages that came and were not taken
    connection.py  pure: bytes in, events out; both roles
    peer.py        a connection on a socket: flushes once a turn, looks whether the other side is alive
    server.py, call.py    servicers behind a listening socket
    details.py     how a call of Headrace's own services fails
    channel.py     calls to one address
"""
