"""What a layer of Titans mixes of a text, token after token in plain loops: the slow path of the fast one."""

from __future__ import annotations

import math

import torch

from evomem.memory.explicit.neural_rules import matrices
from tests.support.slow_neural import SlowNeural


def silu(x):
    return x * torch.sigmoid(x)


def norm(x, layer):
    return x / (x.square().mean() + 1e-6).sqrt() * layer.weight


def unit(x):
    return x / max(float(x.norm()), 1e-12)


def turned(x, position):
    """Return x (size,) rotated to a position: number i with number i + size / 2."""
    out, half = x.clone(), len(x) // 2
    for pair in range(half):
        angle = position * 10_000.0 ** (-pair / half)
        a, b = float(x[pair]), float(x[pair + half])
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class SlowProjection:
    """A projection that remembers what it has seen."""

    def __init__(self, module):
        self.module, self.line = module, []

    def __call__(self, x):
        self.line.append(silu(self.module.linear.weight @ x))
        conv = self.module.taps.shape[1]
        back = [self.line[-1 - step] if step < len(self.line) else None for step in range(conv)]
        taps = self.module.taps
        return sum(taps[:, conv - 1 - step] * one for step, one in enumerate(back) if one is not None)


class SlowMix:
    """The memory and attention of one layer, for one row; give it the tokens one after another."""

    def __init__(self, block, window):
        self.block, self.window, memory = block, window, block.memory
        self.size = len(block.memory_norm.weight) // memory.heads
        limit = memory.limit
        self.memories = [SlowNeural(matrices(one, memory.widths), block.segment, limit) for one in memory.initial]
        self.key, self.value, self.query = (SlowProjection(m) for m in (memory.key, memory.value, memory.query))
        self.retrieve = SlowProjection(memory.retrieve) if block.variant == "mac" else None
        self.count, self.seen, self.recalled = 0, [], []

    def heads(self, x):
        return x.split(self.size)

    def learn(self, x):
        """Write a token, and return what it reads after that."""
        memory = self.block.memory
        gates = torch.sigmoid(memory.gates.weight @ x + memory.gates.bias).view(3, -1).T
        parts = [self.heads(project(x)) for project in (self.key, self.value, self.query)]
        reads = []
        for slow, key, value, query, (forget, momentum, rate) in zip(self.memories, *parts, gates, strict=True):
            forget, momentum = forget * memory.forgets, momentum * memory.has_momentum
            slow.write(unit(key), value, forget, momentum, memory.largest_rate * rate)
            reads.append(slow.read(unit(query)))
        return torch.cat(reads)

    def attend(self, x, recalled=None):
        """Attend to persistent tokens, what was recalled and read in the segment, or the window."""
        module, tokens = self.block.attention, self.seen
        if recalled is not None and self.count % self.block.segment == 0:
            self.seen, self.recalled = tokens, _ = [], []
        tokens.append((self.count, x))
        if recalled is not None:
            self.recalled.append((self.count, recalled))
        near = self.recalled + tokens if recalled is not None else tokens[-self.window :]
        heads = []
        for head in range(module.heads):
            part = slice(head * module.size, (head + 1) * module.size)
            q, k, v = (layer.weight[part] for layer in (module.q_proj, module.k_proj, module.v_proj))
            scores = [(q @ x) @ (k @ one) for one in module.persistent]
            scores += [turned(q @ x, self.count) @ turned(k @ one, at) for at, one in near]
            shares = torch.softmax(torch.stack(scores) / math.sqrt(module.size), 0)
            values = [v @ one for one in module.persistent] + [v @ one for _, one in near]
            heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        return module.o_proj.weight @ torch.cat(heads)

    def __call__(self, x):
        """Return what is added to the token x (hidden,)."""
        block, out = self.block, self.block.out.weight
        normed = norm(x, block.memory_norm)
        match block.variant:
            case "lmm":
                mixed = out @ norm(self.learn(normed), block.read_norm)
            case "mag":
                y = norm(self.attend(normed), block.attention_norm)
                mixed = out @ (y * silu(norm(self.learn(normed), block.read_norm)))
            case "mal":
                stored = out @ norm(self.learn(normed), block.read_norm)
                mixed = stored + self.attend(norm(x + stored, block.attention_norm))
            case _:
                queries = self.heads(self.retrieve(normed))
                read = [slow.recall(unit(query)) for slow, query in zip(self.memories, queries, strict=True)]
                y = norm(self.attend(normed, norm(torch.cat(read), block.recall_norm)), block.attention_norm)
                mixed = out @ (y * silu(norm(self.learn(y), block.read_norm)))
        self.count += 1
        return mixed


class SlowDecided(SlowMix):
    """The same where the tokens of a segment are learnt again by a decision about them.

    Every token of the segment is a dictionary a head: key, value, log-odds of its gates, and how much it surprises.
    """

    def __init__(self, block, window):
        super().__init__(block, window)
        heads = len(self.memories)
        self.held = [[] for _ in range(heads)]
        self.means, self.before = [0.0] * heads, [None] * heads

    def learn(self, x):
        memory = self.block.memory
        logits = (memory.gates.weight @ x + memory.gates.bias).view(3, -1).T
        begins = self.count % self.block.segment == 0
        if begins:
            self.held = [[] for _ in self.memories]
            self.before = [([m.clone() for m in s.matrices], [m.clone() for m in s.momentum]) for s in self.memories]
        read = super().learn(x)
        keys, values = (self.heads(self.mixed(project)) for project in (self.key, self.value))
        for head, (key, value) in enumerate(zip(keys, values, strict=True)):
            said = SlowNeural.answer(self.before[head][0], unit(key))
            error = float((said - value).norm())
            share = max(1 / (self.count + 1), 1 / 64)
            self.means[head] += share * (error - self.means[head])
            self.held[head].append(
                {
                    "key": unit(key), "value": value, "logits": logits[head].tolist(), "said": said,
                    "ratio": error / self.means[head], "surprise": error / float(value.norm()),
                }
            )  # fmt: skip
        return read

    @staticmethod
    def mixed(project):
        """Return what a projection gave last."""
        taps = project.module.taps
        conv = taps.shape[1]
        parts = [taps[:, conv - 1 - step] * project.line[-1 - step] for step in range(min(conv, len(project.line)))]
        return sum(parts)

    def decide(self, judge):
        """Learn the segment again; ``judge`` returns of a token (α, η, θ), or None for one that is not stored."""
        for head, slow in enumerate(self.memories):
            seen = slow.count
            slow.matrices, slow.momentum = ([m.clone() for m in part] for part in self.before[head])
            slow.count -= slow.count % slow.segment or slow.segment
            stored = []
            for token in self.held[head]:
                gates = judge(token)
                if gates is not None:
                    first = slow.count
                    slow.write(token["key"], token["value"], *gates)
                    slow.count = first + (first % slow.segment == 0)  # so that the segment's weights stay its first
                    stored.append(token)
            self.held[head], slow.count = stored, seen
