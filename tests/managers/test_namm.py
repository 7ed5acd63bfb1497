"""NAMM: parity with the recorded reference, the scorers against plain loops, populations against one at a time."""

from __future__ import annotations

import json
import math
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap

from evomem.managers.learned.bam import BAMScorer, causal_attention
from evomem.managers.learned.namm import FEATURES, NAMM
from evomem.managers.vector import load_vector, to_vector, unflatten, vector_size
from evomem.memory import LayerView
from evomem.memory.observations.spectrum import BINS
from evomem.testing.namm import RecordingError, main, read, replay

REFERENCE = Path(__file__).parents[1] / "data" / "namm_bam_update.npz"
SCORERS: list[dict[str, Any]] = [
    {"scorer": "bam"},
    {"scorer": "mlp", "hidden": (7, 5)},
    {"scorer": "mlp", "hidden": ()},
    {"scorer": "linear"},
]


def make_view(lengths: list[list[int]], seed: int = 0, seen: int = 90, slots: int | None = None) -> LayerView:
    """A view whose heads hold that many tokens each, right-aligned; the newest token is always there."""
    draw = torch.Generator().manual_seed(seed)
    wide = slots or max(max(row) for row in lengths)
    held = torch.full((len(lengths), len(lengths[0]), wide), -1)
    for row, heads in enumerate(lengths):
        for head, count in enumerate(heads):
            older = torch.randperm(seen - 1, generator=draw)[: count - 1].sort().values
            held[row, head, wide - count :] = torch.cat([older, torch.tensor([seen - 1])])
    spectrum = torch.rand(*held.shape, BINS, generator=draw) * 3
    # What an empty slot's record holds must not matter, whatever it is.
    spectrum[held < 0] = torch.nan
    keys = torch.zeros(*held.shape, 0)
    start = torch.zeros(len(lengths), dtype=torch.int64)
    return LayerView(keys, keys, held, start, seen, 16, 1, 4, {"attention_spectrum": spectrum})


def make_manager(seed: int = 0, **options: Any) -> NAMM:
    manager = NAMM(**options)
    draw = np.random.default_rng(seed)
    load_vector(manager, draw.normal(size=vector_size(manager)) * 0.3)
    manager.set_statistics(
        torch.from_numpy(draw.uniform(0, 2, BINS)).float(), torch.from_numpy(draw.uniform(0.1, 2, BINS)).float()
    )
    return manager


# ---- the reference ----------------------------------------------------------------------------------------------


def test_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(REFERENCE)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == str(REFERENCE)
    assert report["features"] <= 1e-5
    assert report["scores"] <= 1e-5
    assert report["kept_mismatches"] == 0


def altered(path: Path, **changes: Any) -> Path:
    with np.load(REFERENCE) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    for name, value in changes.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value(arrays[name])
    np.savez(path, **arrays)
    return path


def test_replay_sees_differences(tmp_path: Path) -> None:
    def drop_one(kept: np.ndarray) -> np.ndarray:
        return kept[:, 1:]

    assert replay(read(altered(tmp_path / "a.npz", kept_dense_3=drop_one))).kept_mismatches == 2
    assert replay(read(altered(tmp_path / "b.npz", scores_1=lambda s: s + 0.5))).scores == pytest.approx(0.5, abs=1e-5)
    assert replay(read(altered(tmp_path / "c.npz", features_2=lambda f: f - 2))).features == pytest.approx(2, abs=1e-4)
    wrong = replay(read(altered(tmp_path / "d.npz", theta=lambda t: -t)))
    assert wrong.scores > 1e-3
    assert wrong.kept_mismatches > 0


def test_damaged_recordings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.npz"
    cut.write_bytes(REFERENCE.read_bytes()[:-1000])
    spoiled = bytearray(REFERENCE.read_bytes())
    with zipfile.ZipFile(REFERENCE) as archive:
        middle = archive.getinfo("attention_1.npy").header_offset + 2000
    spoiled[middle : middle + 8] = b"\0\xff" * 4
    flipped = tmp_path / "flipped.npz"
    flipped.write_bytes(spoiled)
    files = [
        tmp_path / "none.npz",
        cut,
        flipped,
        altered(tmp_path / "1.npz", positions_2=None),
        altered(tmp_path / "2.npz", theta=lambda t: t[:-1]),
        altered(tmp_path / "3.npz", var=lambda v: -v),
        altered(tmp_path / "4.npz", attention_0=lambda a: a * np.nan),
        altered(tmp_path / "5.npz", attention_1=lambda a: a[:3]),
        altered(tmp_path / "6.npz", positions_1=lambda p: p[:, ::-1]),
        altered(tmp_path / "7.npz", positions_0=lambda p: p.astype(np.float32)),
        altered(tmp_path / "8.npz", attention_3=lambda a: a[:, :63]),
    ]
    for file in files:
        with pytest.raises(RecordingError, match=file.name):
            read(file)
    whole = tmp_path / "whole.npz"
    shutil.copy(REFERENCE, whole)
    assert main([*map(str, files), str(whole)]) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == len(files)
    assert json.loads(output.out)["kept_mismatches"] == 0


# ---- the scorers, against plain loops ---------------------------------------------------------------------------


def features_in_loops(manager: NAMM, view: LayerView, row: int, head: int) -> list[np.ndarray]:
    """The 25 numbers of every slot that holds a token."""
    mean, var = manager.spectrum_mean.double().numpy(), manager.spectrum_var.double().numpy()
    found = []
    for slot in range(view.slots.shape[-1]):
        token = int(view.slots[row, head, slot])
        if token < 0:
            continue
        age = view.seen - 1 - token
        angles = [age * 50000 ** (-k / 4) for k in range(4)]
        spectrum = view.recorded["attention_spectrum"][row, head, slot].double().numpy()
        standard = (spectrum - mean) / np.maximum(np.sqrt(var), 1e-7)
        found.append(np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles] + list(standard)))
    return found


def bam_in_loops(vector: np.ndarray, inputs: list[np.ndarray]) -> list[float]:
    """The published equations on the published flat vector."""
    cuts = np.cumsum([25 * 96, 96, 32 * 50, 50, 25])
    w_qkv, b_qkv, w_o, b_o, w, b = np.split(vector, cuts)
    rows = [x @ w_qkv.reshape(25, 96) + b_qkv for x in inputs]
    scores = []
    for i, x in enumerate(inputs):
        logits = np.array([rows[i][:32] @ rows[j][32:64] / math.sqrt(32) for j in range(i, len(inputs))])
        weights = np.exp(logits - logits.max())
        attended = sum(weight * rows[i + j][64:] for j, weight in enumerate(weights / weights.sum()))
        o = attended @ w_o.reshape(32, 50) + b_o
        scores.append(float(w @ (x * (1 + o[25:]) + o[:25]) + b[0]))
    return scores


def mlp_in_loops(vector: np.ndarray, inputs: list[np.ndarray], hidden: tuple[int, ...]) -> list[float]:
    scores = []
    for h in inputs:
        start = 0
        for size in hidden:
            weight = vector[start : start + len(h) * size].reshape(len(h), size)
            bias = vector[start + len(h) * size : start + (len(h) + 1) * size]
            start += (len(h) + 1) * size
            h = np.tanh(h @ weight + bias)
        scores.append(float(vector[start:-1] @ h + vector[-1]))
    return scores


@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_scores_equal_plain_loops(options: dict[str, Any]) -> None:
    manager = make_manager(**options)
    view = make_view([[12, 5], [1, 9]])
    scores = manager.score(view)
    assert scores.shape == view.slots.shape
    assert scores.dtype == torch.float32
    for row in range(2):
        for head in range(2):
            inputs = features_in_loops(manager, view, row, head)
            vector = to_vector(manager)
            if options["scorer"] == "bam":
                expected = bam_in_loops(vector, inputs)
            else:
                expected = mlp_in_loops(vector, inputs, options.get("hidden", ()))
            got = scores[row, head][view.valid[row, head]].detach().double().numpy()
            np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)


def test_a_slot_is_judged_by_itself_and_the_later_ones_only() -> None:
    scorer = make_manager().scorer
    x = torch.randn(1, 2, 12, FEATURES)
    scores = scorer(x)
    for slot in range(12):
        changed = x.clone()
        changed[:, :, slot] += 1.0
        difference = (scorer(changed) - scores).abs()
        assert not difference[..., slot + 1 :].any()
        assert (difference[..., : slot + 1] > 1e-7).all()


@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_row_alone_and_padding_do_not_matter(options: dict[str, Any]) -> None:
    manager = make_manager(**options)
    lengths = [[12, 5], [3, 9], [1, 1]]
    together = make_view(lengths, slots=15)
    scores, keep = manager.score(together), manager.decide(together).keep
    assert not keep[~together.valid].any()
    for row in range(len(lengths)):
        for head in range(2):
            count = lengths[row][head]
            alone = LayerView(
                keys=together.keys[:1, :1, -count:],
                values=together.values[:1, :1, -count:],
                slots=together.slots[row : row + 1, head : head + 1, -count:],
                start=together.start[:1],
                seen=together.seen,
                fresh=together.fresh,
                layer=together.layer,
                layers=together.layers,
                recorded={
                    "attention_spectrum": together.recorded["attention_spectrum"][None, None, row, head, -count:]
                },
            )
            torch.testing.assert_close(manager.score(alone)[0, 0], scores[row, head, -count:], atol=1e-5, rtol=1e-5)
            assert torch.equal(manager.decide(alone).keep[0, 0], keep[row, head, -count:])


# ---- populations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["threshold", "capped", "dense"])
@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_population_equals_one_at_a_time(options: dict[str, Any], selection: str) -> None:
    manager = make_manager(selection=selection, budget=6 if selection == "capped" else None, **options)
    view = make_view([[12, 5, 9], [3, 9, 12]])
    vectors = torch.from_numpy(np.stack([to_vector(make_manager(seed, **options)) for seed in range(5)])).float()

    def one(vector: Tensor) -> tuple[Tensor, Tensor]:
        parameters = unflatten(manager, vector)
        keep = functional_call(manager, parameters, (view,)).keep
        scorer = {name.removeprefix("scorer."): value for name, value in parameters.items()}
        return keep, functional_call(manager.scorer, scorer, (manager.features(view),))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        keep, scores = vmap(one)(vectors)
    for index, vector in enumerate(vectors):
        load_vector(manager, vector.numpy())
        fresh = make_view([[12, 5, 9], [3, 9, 12]])
        torch.testing.assert_close(scores[index], manager.score(fresh), atol=1e-5, rtol=1e-5)
        assert torch.equal(keep[index], manager.decide(fresh).keep)


@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_population_with_a_memory_each_equals_one_at_a_time(options: dict[str, Any]) -> None:
    """As in streaming, where after the first decision every candidate holds other slots."""
    manager = make_manager(**options, budget=6)
    views = [make_view([[12, 5, 9]], seed=seed) for seed in range(4)]
    vectors = torch.from_numpy(np.stack([to_vector(make_manager(seed, **options)) for seed in range(4)])).float()

    def one(vector: Tensor, slots: Tensor, spectrum: Tensor) -> Tensor:
        view = replace(views[0], slots=slots, recorded={"attention_spectrum": spectrum}, memo={})
        keep: Tensor = functional_call(manager, unflatten(manager, vector), (view,)).keep
        return keep

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep = vmap(one)(
            vectors,
            torch.stack([view.slots for view in views]),
            torch.stack([view.recorded["attention_spectrum"] for view in views]),
        )
    for index, view in enumerate(views):
        load_vector(manager, vectors[index].numpy())
        assert torch.equal(keep[index], manager.decide(view).keep)


def test_population_gradients_equal_one_at_a_time() -> None:
    scorer = BAMScorer(FEATURES)
    x = torch.randn(2, 2, 9, FEATURES)
    vectors = torch.randn(3, vector_size(scorer)) * 0.1

    def loss(vector: Tensor) -> Tensor:
        scores: Tensor = functional_call(scorer, unflatten(scorer, vector), (x,))
        return scores.square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = vmap(grad(loss))(vectors)
    for index, vector in enumerate(vectors):
        direction = torch.nn.functional.normalize(torch.randn_like(vector), dim=0)
        step = 1e-2
        slope = (loss(vector + step * direction) - loss(vector - step * direction)) / (2 * step)
        assert (together[index] @ direction).item() == pytest.approx(slope.item(), rel=0.02, abs=0.02)
        torch.testing.assert_close(together[index], grad(loss)(vector), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(
    population=st.integers(1, 4),
    batch=st.integers(1, 3),
    slots=st.integers(1, 40),
    which=st.sampled_from([(0, 0, 0), (0, None, None), (None, 1, 0), (3, 0, None)]),
)
def test_folded_attention_equals_a_loop(
    population: int, batch: int, slots: int, which: tuple[int | None, int | None, int | None]
) -> None:
    tensors = []
    for dim in which:
        shape = [batch, 2, slots, 8]
        if dim is not None:
            shape.insert(dim, population)
        tensors.append(torch.randn(shape))
    together = vmap(causal_attention, in_dims=which)(*tensors)
    mask = torch.ones(slots, slots).tril().bool()
    for index in range(population):
        q, k, v = (t if dim is None else t.select(dim, index) for t, dim in zip(tensors, which, strict=True))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(together[index], weights @ v, atol=1e-5, rtol=1e-5)
