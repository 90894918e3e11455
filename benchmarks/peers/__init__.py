"""The servers that ``vs_peers.py`` compares: how each is built, started and ended, and the models they serve."""
