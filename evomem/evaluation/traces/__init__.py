"""Evaluation: what heads saw and what was attended to, on disk, so that neither needs the model again."""
