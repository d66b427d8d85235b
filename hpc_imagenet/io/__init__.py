"""Atomic files, temporary folders, disk space, process pools, signals."""
