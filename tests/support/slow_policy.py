"""What `kv_policy` decides, draws and thinks likely: one row and one head at a time, in Python numbers."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from evomem.managers.learned.kv_policy import SPREAD
from tests.managers.test_features import slow_feature, slow_observation
from tests.support.ragged_view import HEADS, START


class Slow:
    """What a policy thinks of one head's tokens, oldest first."""

    def __init__(self, policy, view, b, h, parameters=None):
        o, self.view, self.b, self.h = policy.options, view, b, h
        p = {n: v.detach().double().numpy() for n, v in policy.named_parameters()} if parameters is None else parameters
        self.held = [s for s, t in enumerate(view.slots[b, h].tolist()) if t >= 0]
        self.ages = [view.seen - 1 - int(view.slots[b, h, s]) for s in self.held]
        self.fresh = [age < view.fresh for age in self.ages]
        depth = view.layer / (view.layers - 1) - 0.5

        def at(knots):
            flat = knots.reshape(len(knots), -1)
            places = np.linspace(0, 1, len(knots)) if len(knots) > 1 else np.zeros(1)
            return np.array([np.interp(depth + 0.5, places, column) for column in flat.T]).reshape(knots.shape[1:])

        columns = []
        for place, name in enumerate(o.features):
            if o.scale == "head":
                values = slow_feature(name, view, b, h)
            else:
                assert ":" not in name or name.startswith(("mean", "max"))
                mean, deviation = float(policy.feature_mean[place]), float(policy.feature_deviation[place])
                values = [(x - mean) / deviation for x in unscaled(name, view, b, h)]
            columns.append([min(max(x, -10.0), 10.0) for x in values])
        self.outputs = {}
        for number, action in enumerate(o.actions):
            own = at(p["weights"][number])
            if action == "evict" and o.layers:
                mine = at(p["own"])
                own = own + (mine[h] if o.heads == HEADS else mine.mean(0))
            found = []
            for z in zip(*columns, strict=True):
                total = sum(w * x for w, x in zip(own, z, strict=True))
                for unit in range(o.hidden):
                    inner = sum(w * x for w, x in zip(p["inner"][unit], z, strict=True))
                    total += p["outer"][number, unit] * math.tanh(inner + p["bias"][unit] + p["by_depth"][unit] * depth)
                others = [name for name in o.actions if name != "evict"]
                found.append(total + (p["offset"][others.index(action)] if action != "evict" else 0.0))
            self.outputs[action] = found
        read = view.seen - int(view.start[b])
        self.n = math.ceil(read * o.budget - 1e-6) if isinstance(o.budget, float) else o.budget or read
        sinks = min(o.sinks, self.n)
        recent = min(o.recent, self.n - sinks)
        self.ends = [
            int(view.slots[b, h, s]) - int(view.start[b]) < sinks or age < recent
            for s, age in zip(self.held, self.ages, strict=True)
        ]

    def kept(self, scores, stored):
        """Slots: the protected ends, then the best of what was not refused, the older of two equal ones first."""
        able = [i for i in range(len(self.held)) if stored[i] or not self.fresh[i]]
        order = sorted(able, key=lambda i: (not self.ends[i], -math.inf if self.ends[i] else -scores[i], i))
        return {self.held[i] for i in order[: self.n]}

    def deployed(self):
        everything = [True] * len(self.held)
        stored = [o >= 0 for o in self.outputs["store"]] if "store" in self.outputs else everything
        return self.kept(self.outputs.get("evict", [-age for age in self.ages]), stored)

    def drawn(self, action):
        """The slots that an action keeps."""
        stored, scores = self._stored(action), [-float(age) for age in self.ages]
        if action.ranking is not None:
            order = action.ranking[self.b, self.h].tolist()
            scores = [-order.index(slot) for slot in self.held]
        return self.kept(scores, stored)

    def _stored(self, action):
        if action.stored is None:
            return [True] * len(self.held)
        return [bool(action.stored[self.b, self.h, s]) for s in self.held]

    def log_probs(self, action):
        """The log-likelihood of every choice, in the order in which they are made."""
        found, stored = [], self._stored(action)
        if action.stored is not None:
            for yes, g, fresh in zip(stored, self.outputs["store"], self.fresh, strict=True):
                found += [-math.log1p(math.exp(-g if yes else g))] if fresh else []
        if action.ranking is not None:
            able = [i for i in range(len(self.held)) if stored[i] or not self.fresh[i]]
            left = {self.held[i]: self.outputs["evict"][i] for i in able if not self.ends[i]}
            picks = max(0, self.n - sum(self.ends[i] for i in able))
            for slot in action.ranking[self.b, self.h].tolist()[: min(picks, len(left))]:
                found.append(left[slot] - math.log(sum(math.exp(score) for score in left.values())))
                del left[slot]
        if action.rates is not None:
            for slot, mean in zip(self.held, self.outputs["forget"], strict=True):
                found.append(stats.norm.logpdf(float(action.rates[self.b, self.h, slot]), mean, SPREAD))
        return found

    def log_prob(self, action):
        """The sum over the choices, and how many there are."""
        found = self.log_probs(action)
        return sum(found), len(found)


def unscaled(name, view, b, h):
    parts = name.split(":")
    if parts[0] not in ("mean", "max"):
        return slow_observation(parts[0], parts[1] if parts[1:] else "", view, b, h)
    values, width = slow_observation(parts[2], "", view, b, h), int(parts[1])
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [max(x) if parts[0] == "max" else sum(x) / len(x) for x in near]


def heads():
    return [(b, h) for b in range(len(START)) for h in range(HEADS)]


def marked(keep, b, h):
    return set(keep[b, h].nonzero()[:, 0].tolist())
