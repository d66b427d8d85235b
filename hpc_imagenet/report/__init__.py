"""Reports on runs: job table, leaderboard, logs, dry run."""
