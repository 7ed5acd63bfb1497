"""Histories of names as lists of Python, token by token: what `evomem.memory.observations.ghosts` must equal."""

from __future__ import annotations


class SlowGhosts:
    """The pairs of one head, and the reads of every name that is in a slot or among the ghosts."""

    def __init__(self):
        self.slots, self.ghosts, self.reads, self.seen = [], [], {}, 0  # slots: (token, name, mark)

    def feed(self, name, mark, reads, writes):
        there = [slot for slot in self.slots if slot[1] == name]
        if writes and not (there and there[-1][2] == mark):
            self.slots.append((self.seen, name, mark))
            self.ghosts = [ghost for ghost in self.ghosts if ghost != name]
            self.reads.setdefault(name, [])
        if reads and name in self.reads:
            self.reads[name].append(self.seen)
        self.seen += 1

    def keep(self, tokens):
        """Evict all slots but those written at these tokens; the last to leave are the ghosts."""
        newest = {name: token for token, name, _ in self.slots}
        left = [slot for slot in self.slots if slot[0] not in tokens]
        self.slots = [slot for slot in self.slots if slot[0] in tokens]
        stay = {name for _, name, _ in self.slots}
        self.ghosts += [name for token, name, _ in left if newest[name] == token and name not in stay]
        self.ghosts = self.ghosts[len(self.ghosts) - min(len(self.ghosts), len(self.slots)) :]
        self.reads = {name: when for name, when in self.reads.items() if name in stay or name in self.ghosts}

    def observed(self, longest):
        """Return the slots' frequency and backward distance, by the token that wrote them."""
        newest = {name: token for token, name, _ in self.slots}
        result = {}
        for token, name, _ in self.slots:
            when = self.reads[name] if newest[name] == token else []
            distance = self.seen - 1 - when[-2] if len(when) > 1 else longest
            result[token] = (len(when), min(distance, longest))
        return result
