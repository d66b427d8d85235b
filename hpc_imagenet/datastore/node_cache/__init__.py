"""Cache of shards on a node's own disk."""
