"""What users see of runs: job table, leaderboard, logs, dry run."""
