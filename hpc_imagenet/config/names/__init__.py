"""Names that settings may have: of networks, optimizers and trackers; checked without torch."""
