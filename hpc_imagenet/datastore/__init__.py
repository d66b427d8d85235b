"""Datastores: named, numbered versions of a dataset that never change."""
