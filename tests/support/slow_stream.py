"""A cache as a dictionary, request by request: what `evomem.evaluation.streams` must measure of LRU, FIFO and all."""

from __future__ import annotations

import math


def answered(stream, slots, every, order):
    """Return which requests are answered, when every ``every`` requests the first pairs by ``order`` leave.

    order : function of (item's number of the request that stored it, that of its last use, its reads); pairs for which
        it is smallest leave. The newest request's pair stays. None: nothing ever leaves.
    """
    held, right = {}, []
    for number, (item, value) in enumerate(zip(stream.ids.tolist(), stream.values.tolist(), strict=True)):
        known = held.get(item)
        there = known is not None and known["value"] == value
        right.append(bool(stream.reads[number]) and there)
        if stream.reads[number] and known is not None:
            known["used"], known["reads"] = number, known["reads"] + 1
        if stream.writes[number] and not there:
            held[item] = {"value": value, "stored": number, "used": number, "reads": 0}
        if order is not None and (number + 1) % every == 0:
            while len(held) > slots:
                old = [item for item in held if held[item]["stored"] != number]
                del held[min(old, key=lambda item: order(*(held[item][n] for n in ("stored", "used", "reads"))))]
    return right


def exact(stream, right):
    """Return the share of reads that are answered."""
    return sum(right) / int(stream.reads.sum())


def loglik(stream, right, items, doubt):
    """Return the mean log-likelihood of a reader who guesses where nothing was there."""
    of_right, of_miss = math.log(1 - doubt + doubt / items), math.log(1 / items)
    reads = [answer for answer, read in zip(right, stream.reads.tolist(), strict=True) if read]
    return sum(of_right if answer else of_miss for answer in reads) / len(reads)
