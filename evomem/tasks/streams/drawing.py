"""Task: what streams are drawn from: Zipf's law, topics that change, scans; all vectorised."""

from __future__ import annotations

import numpy as np

from evomem.tasks.streams.base import Bools, Ints


def zipf(draw: np.random.Generator, exponent: float, count: Ints) -> Ints:
    """Return ranks from 0 on, rank r with probability proportional to (r + 1)^-exponent (Zipf's law).

    Parameters
    ----------
    count : (requests,) how many ranks there are for each request.
    """
    if not len(count):
        return np.zeros(0, np.int64)
    weights = np.cumsum(np.arange(1, int(count.max()) + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(weights, draw.random(len(count)) * weights[count - 1], side="right")
    return np.minimum(ranks, count - 1)


def topic_path(draw: np.random.Generator, length: int, topics: int, dwell: float) -> Ints:
    """Return the topic of every request: it changes to another one with probability 1/dwell."""
    if topics == 1:
        return np.zeros(length, np.int64)
    changes = draw.random(length) < 1 / dwell
    steps = np.where(changes, draw.integers(1, topics, length), 0)
    steps[0] = draw.integers(topics)
    return np.cumsum(steps) % topics


def topic_items(draw: np.random.Generator, exponent: float, path: Ints, keys: int, topics: int) -> Ints:
    """Return an item of each request's topic: item i is of topic i mod topics, and lower ones are likelier."""
    ranks = zipf(draw, exponent, (keys - path + topics - 1) // topics)
    return ranks * topics + path


def scans(draw: np.random.Generator, length: int, keys: int, share: float, steps: int) -> tuple[Bools, Ints]:
    """Return which requests belong to scans, and the items that these ask for, one after the other.

    Parameters
    ----------
    share : of all requests, in the mean.
    steps : requests of one scan.
    """
    block = (np.arange(length) + draw.integers(steps)) // steps
    blocks = int(block[-1]) + 1
    scanned = (draw.random(blocks) < share)[block]
    items = (draw.integers(keys, size=blocks)[block] + np.arange(length)) % keys
    return scanned, items
