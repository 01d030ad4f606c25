"""Store measurements, and show them: tables, the leaderboard page, exports."""
