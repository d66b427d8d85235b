"""Run folders: planned jobs, attempts, outcomes, and which process may write."""
