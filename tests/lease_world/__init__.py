"""A cluster in miniature for one purpose: to try interleavings of everything that happens to leases.

Workers, a router and the network between them, without a socket, a thread or a wall clock. What decides is the
product's own: lease tables and keepers, block pools, the senders' ledgers and contact, coverage, fencing. What
is simulated is what carries it: messages wait in a bag until somebody delivers, loses or repeats them, memory is
a dictionary that knows whose frame wrote each entry, and time stands until it is told to pass.

    content   what every entry of every prompt's cache must be
    memory    one worker's blocks, and who may write where
    sending   one lease's frames on their way out
    prefill, decode, fetch   the roles of a worker
    worker    one process: it freezes, crashes, restarts and fences itself
    router    raises attempts
    network   the bag, and streams that break
    world     all of it, the chaos, and what must hold
"""
