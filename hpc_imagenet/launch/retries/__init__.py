"""Failed runs: what their logs show, why they failed, and what a retry changes."""
