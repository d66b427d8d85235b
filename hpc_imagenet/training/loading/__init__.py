"""Data loading: sample, read, decode and crop images, and prefetch batches to the device."""
