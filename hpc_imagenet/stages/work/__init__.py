"""The work of each stage on a node."""
