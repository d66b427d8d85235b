"""Looking at the record: the table of jobs, the logs, the leaderboard."""
