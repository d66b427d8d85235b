"""Reports on runs: job table, leaderboard, report page, logs, dry run."""
