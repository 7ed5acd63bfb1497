"""Task: samples of text."""
