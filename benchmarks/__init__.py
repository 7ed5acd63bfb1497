"""Evaluation: how fast and how small evomem is, as ratios within one run (`python -m benchmarks.run`)."""
