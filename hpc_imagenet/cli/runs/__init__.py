"""Commands on runs and on their networks."""
