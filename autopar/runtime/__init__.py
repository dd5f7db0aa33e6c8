"""The runtime: local ranks as worker processes, the channel to them, and what they execute."""
