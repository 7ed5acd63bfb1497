"""Managers: features of slots against plain loops over one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomem.errors import ConfigError
from evomem.managers import FeatureScorer
from evomem.managers.features import FEATURES, features, parse, required
from tests.support.ragged_view import DIM, HEADS, START, alone, make_view

PLAIN = (
    "keydiff", "valuediff", "key_norm", "value_norm", "key_step", "value_step", "age", "position", "sink",
    "attention", "attention_per_query", "window:8", "window:32", "spectrum:0", "spectrum:16",
    "last:8", "block_max:64", "block_min:64", "block_sum:64", "block_decayed:64",
    "recency", "frequency", "frequency_decayed:8", "relevance:8", "novelty", "surprise",
    "ghost_frequency", "backward_distance:8", "change", "agreement", "updates", "tri_attention",
    "surprise_ratio", "forget_gate", "momentum_gate", "rate_gate",
)  # fmt: skip
POOLED = ("mean:3:keydiff", "mean:7:attention", "max:7:value_norm", "max:21:age", "mean:7:window:8", "max:3:spectrum:4")
ALL = PLAIN + POOLED
SHARED = (
    "recency", "frequency", "frequency_decayed:8", "relevance:8", "surprise", "ghost_frequency", "backward_distance:8",
    "change", "agreement", "updates", "tri_attention", "surprise_ratio",
)  # fmt: skip
"""Features that are recorded under their own names."""


def view_of(seed=0, **changes):
    """Ragged heads, two rows with different starts, also with a spectrogram; empty slots hold garbage."""
    view = make_view(seed, **changes)
    g = torch.Generator().manual_seed(seed + 100)
    spectrum = torch.rand(*view.slots.shape, 17, generator=g)
    statistics = torch.rand(*view.slots.shape, 4, generator=g)
    more = {"attention_spectrum": spectrum, "window_statistics:64": statistics}
    for name in SHARED:
        more[name] = 9 * torch.rand(view.slots.shape, generator=g)
    more["gates"] = torch.randn(*view.slots.shape, 3, generator=g)
    more["recency"] = more["recency"].argsort(-1)  # no two the same
    return replace(view, recorded={**view.recorded, **more})


def spoiled(view):
    """The view with other things in its empty slots."""
    empty = ~view.valid

    def spoil(x):
        wide = empty.view(*empty.shape, *([1] * (x.dim() - 3)))
        return torch.where(wide, torch.tensor(7.7e3, dtype=x.dtype), x)

    slotwise = {
        n: spoil(x) if n.startswith(("attention_", "window_", "gates", *SHARED)) else x
        for n, x in view.recorded.items()
    }
    return replace(view, keys=spoil(view.keys), values=spoil(view.values), recorded=slotwise, memo={})


# ---- the slow path --------------------------------------------------------------------------------------------------


def slow_observation(name, argument, view, b, h):
    """What one head's tokens are described by, oldest first, in Python numbers."""
    held = [s for s, t in enumerate(view.slots[b, h].tolist()) if t >= 0]
    ages = [view.seen - 1 - int(view.slots[b, h, s]) for s in held]
    positions = [int(view.slots[b, h, s]) - int(view.start[b]) for s in held]

    def vectors(x):
        return [[float(i) for i in x[b, h, s]] for s in held]

    def norm(x):
        return math.sqrt(sum(i * i for i in x))

    def cosine(x, y):
        return sum(i * j for i, j in zip(x, y, strict=True)) / (norm(x) * norm(y))

    def recorded(which):
        return [float(view.recorded[which][b, h, s]) for s in held]

    if name in ("keydiff", "valuediff"):
        own = vectors(view.keys if name == "keydiff" else view.values)
        mean = [sum(x[d] / norm(x) for x in own) / len(own) for d in range(DIM)]
        return [-cosine(x, mean) for x in own]
    if name in ("key_norm", "value_norm"):
        return [math.log(norm(x) + 1e-6) for x in vectors(view.keys if name == "key_norm" else view.values)]
    if name in ("key_step", "value_step"):
        own = vectors(view.keys if name == "key_step" else view.values)
        return [0.0] + [1 - cosine(x, y) for x, y in zip(own[1:], own, strict=False)]
    if name == "age":
        return [math.log(1 + age) for age in ages]
    if name == "position":
        return [math.log(1 + position) for position in positions]
    if name == "sink":
        return [float(position < 4) for position in positions]
    if name == "attention":
        return [math.log(a + 1e-6) for a in recorded("attention_sum")]
    if name == "attention_per_query":
        return [math.log(a / (age + 1) + 1e-6) for a, age in zip(recorded("attention_sum"), ages, strict=True)]
    if name == "window":
        return [math.log(a + 1e-6) for a in slow_pool(recorded(f"window_attention:{argument}"), 5, max)]
    if name == "last":
        return [math.log(a * int(argument) + 1e-6) for a in recorded(f"window_attention:{argument}")]
    if name.startswith("block_"):
        which = ("block_max", "block_min", "block_sum", "block_decayed").index(name)
        return [math.log(float(view.recorded[f"window_statistics:{argument}"][b, h, s, which]) + 1e-6) for s in held]
    if name == "novelty":
        own = vectors(view.keys)
        return [1 - max(cosine(x, y) for j, y in enumerate(own) if j != i) for i, x in enumerate(own)]
    if name == "updates":
        return [math.log(max(1, x)) for x in recorded(name)]
    if name in ("relevance", "surprise", "change", "agreement", "tri_attention"):
        return recorded(f"relevance:{argument}" if argument else name)
    if name == "surprise_ratio":
        return [math.log(1 + x) for x in recorded(name)]
    if name.endswith("_gate"):
        which = ("forget_gate", "momentum_gate", "rate_gate").index(name)
        return [float(view.recorded["gates"][b, h, s, which]) for s in held]
    if name in ("recency", "frequency", "frequency_decayed", "ghost_frequency", "backward_distance"):
        return [math.log(1 + x) for x in recorded(f"{name}:{argument}" if argument else name)]
    bins = view.recorded["attention_spectrum"][b, h]
    return [math.log(float(bins[s, int(argument)]) + 1e-6) for s in held]


def slow_pool(values, width, how):
    near = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [how(around) for around in near]


def slow_feature(name, view, b, h):
    how, width, observation, argument = parse(name)
    values = slow_observation(observation, argument, view, b, h)
    if how:
        values = slow_pool(values, width, max if how == "max" else lambda around: sum(around) / len(around))
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / max(deviation, 1e-4) for x in values]


@pytest.mark.parametrize("seed", [0, 1])
def test_features_equal_plain_loops(seed):
    view = spoiled(view_of(seed))
    found = features(view, ALL)
    assert found.dtype == torch.float32
    assert found.shape == (*view.slots.shape, len(ALL))
    for place, name in enumerate(ALL):
        for b in range(len(START)):
            for h in range(HEADS):
                valid = view.valid[b, h]
                expected = torch.tensor(slow_feature(name, view, b, h))
                torch.testing.assert_close(
                    found[b, h, valid, place], expected, atol=1e-3, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )
                assert torch.all(found[b, h, ~valid, place] == 0), name


def test_every_observation_is_tested():
    assert {parse(name)[2] for name in ALL} == set(FEATURES)


def test_features_are_standardised():
    view = view_of()
    found, valid = features(view, ALL), view.valid[..., None]
    count = valid.sum(2)
    mean = found.sum(2) / count
    variance = (found.square() * valid).sum(2) / count
    # A head whose values are all the same has nothing to standardise; what is left is rounding, the same for all slots.
    constant = variance < 0.5
    assert mean[~constant].abs().max() < 1e-5
    assert constant.float().mean() < 0.2
    torch.testing.assert_close(variance[~constant], torch.ones_like(variance[~constant]), atol=1e-3, rtol=0)
    assert torch.all(found.abs().amax(2)[constant] < 1e-3)


def test_features_do_not_depend_on_empty_slots_or_the_batch():
    view = view_of()
    found = features(view, ALL)
    torch.testing.assert_close(features(spoiled(view), ALL), found, atol=0, rtol=0)
    for row in range(len(START)):
        one = alone(view, row)
        lone = features(one, ALL)[0]
        torch.testing.assert_close(lone, found[row, :, -one.slots.shape[2] :], atol=2e-4, rtol=1e-4)


def test_features_do_not_depend_on_scale_or_head_size():
    view = view_of()
    names = tuple(name for name in ALL if not required((name,)))
    larger = replace(view, keys=view.keys * 37.0, values=view.values * 0.2, memo={})
    torch.testing.assert_close(features(larger, names), features(view, names), atol=2e-3, rtol=1e-3)
    wide = replace(view, keys=torch.cat((view.keys,) * 4, -1), values=torch.cat((view.values,) * 4, -1), memo={})
    torch.testing.assert_close(features(wide, names), features(view, names), atol=2e-3, rtol=1e-3)


def test_first_token_has_no_step_even_after_padding():
    """Whatever lies in the empty slot before it."""
    view = spoiled(view_of(3))
    for name in ("key_step", "value_step"):
        steps = FEATURES[name].compute
        raw = steps(view, "")
        for b in range(len(START)):
            for h in range(HEADS):
                first = int(view.valid[b, h].long().argmax())
                assert raw[b, h, first] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keydif", "unknown observation 'keydif'.*keydiff"),
        ("", "unknown observation"),
        ("mean:4:keydiff", "odd number"),
        ("max:keydiff", "odd number"),
        ("mean", "odd number"),
        ("mean:7", "unknown observation ''"),
        ("window", "number of queries"),
        ("window:0", "number of queries"),
        ("window:x", "number of queries"),
        ("spectrum:17", "bin from 0 to 16"),
        ("spectrum", "bin from 0 to 16"),
        ("keydiff:3", "takes no argument"),
        ("mean:3:mean:3:keydiff", "unknown observation 'mean'"),
        ("window:8:9", "unknown"),
    ],
)
def test_wrong_features_are_named(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(ConfigError, match=r"feature_scorer.*features"):
        FeatureScorer(features=[name])


@given(
    how=st.sampled_from(["", "mean:", "max:"]),
    width=st.integers(0, 30).map(lambda n: 2 * n + 1),
    observation=st.sampled_from(sorted(FEATURES)),
    argument=st.integers(1, 16),
)
def test_names_round_trip(how, width, observation, argument):
    with_argument = any(char.isdigit() for name in PLAIN if name.split(":")[0] == observation for char in name)
    name = f"{how}{f'{width}:' if how else ''}{observation}{f':{argument}' if with_argument else ''}"
    expected = (how.rstrip(":"), width if how else 0, observation, str(argument) if with_argument else "")
    assert parse(name) == expected
    needs = FEATURES[observation].needs.format(argument)
    assert required((name,)) == ({needs} if needs else set())
