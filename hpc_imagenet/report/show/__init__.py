"""Everything about one run, and two runs compared."""
