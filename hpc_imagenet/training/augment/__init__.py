"""Augmentations of a whole batch on its device."""
