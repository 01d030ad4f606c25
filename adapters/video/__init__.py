"""Videos: read their frames, and score them for a question."""
