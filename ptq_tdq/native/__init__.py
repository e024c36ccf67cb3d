"""C in this process: how a library is built and opened, what may be given to it, and what the core computes in it."""
