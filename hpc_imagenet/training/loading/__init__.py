"""From addresses to device batches: sample, read, decode, crop, prefetch."""
