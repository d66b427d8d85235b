"""Write shards and class folders, and verify a dataset."""
