"""What the serving benchmark starts: one self-contained file per peer, run in a process of its own."""
