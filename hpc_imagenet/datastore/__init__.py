"""Datastores: named, numbered, immutable versions of a dataset."""
