"""Base: how large the numbers of configurations may be: far beyond what anybody uses, far below what has no end.

Every field of every configuration has two bounds (`tests/test_bounds.py` walks them all). What fits within them and is
still too much for a machine, `evomem.evaluation.needs` says before it begins.
"""

from __future__ import annotations

TOKENS = 2**31 - 1
"""Slots of a head, and whatever counts tokens of a cache."""
LENGTH = 10**7
"""Tokens of one sample."""
CONTEXTS = 10**6
"""Samples of a split."""
GENERATIONS = 10**7
POPULATION = 10**5
"""Candidates of a generation."""
LISTED = 1000
"""Entries of a list that a person writes: tasks, stages, budgets."""
UNITS = 4096
"""Units of a network's layer, knots, points of depth."""
NEIGHBOURS = 4096
"""The largest window of queries or slots that a manager looks at; attention or pooling of more would fill memory."""
BYTES = 2**50
SEED = 2**63 - 1
SMALL, LARGE = 1e-30, 1e6
"""Step sizes, rates, factors: the square of the smallest is still a number that can be divided by."""
VALUE = 1e12
"""Measured values, options, weights."""
