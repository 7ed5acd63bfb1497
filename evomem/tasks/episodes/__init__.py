"""Task: episodes of an environment, read as tokens."""
