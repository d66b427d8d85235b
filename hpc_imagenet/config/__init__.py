"""Configuration: the typed schema, its bounds, and how Hydra composes it."""
