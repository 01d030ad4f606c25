"""Suites of questions, the runner that puts methods through them, and the leaderboard."""
