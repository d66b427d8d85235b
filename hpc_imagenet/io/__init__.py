"""Atomic files, temporary folders, free disk space, process pools, stop signals."""
