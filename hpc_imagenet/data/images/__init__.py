"""Image headers, and the transforms applied while shards are written."""
