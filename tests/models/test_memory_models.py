"""Models with a memory of their own, managed and not: half precision, padding, compiled, a damaged folder."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomem.errors import CacheError, ModelError
from evomem.managers import build
from evomem.models import load
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.loading import available
from tests.models.test_mosaic import tiny_mosaic

HALVES = (torch.float16, torch.bfloat16)
EVICTING = "feature_scorer(features=[recency, frequency, novelty, 'relevance:4'], sinks=0)"


def tiny_matrix(**sizes):
    torch.manual_seed(0)
    config = MemoryMatrixConfig(
        **sizes,
        vocab_size=30, hidden_size=16, num_attention_heads=4, intermediate_size=24, window=4, matrix_slots=5,
        matrix_width=6, matrix_heads=2, initializer_range=0.4, decay=0.9, decay_per_slot=True,
    )  # fmt: skip
    return MemoryMatrix(config).eval().requires_grad_(False)


MODELS = {"matrix": tiny_matrix(), "v1": tiny_mosaic("v1"), "v2": tiny_mosaic("v2")}
every_model = pytest.mark.parametrize("name", MODELS)


def ids_of(seed, count, rows=2):
    return torch.randint(30, (rows, count), generator=torch.Generator().manual_seed(seed))


def evicting(budget=5, every=3):
    manager = build(EVICTING, budget=budget, every=every)
    with torch.no_grad():
        manager.weights.copy_(torch.linspace(-1, 1, manager.weights.numel()).reshape(manager.weights.shape))
    return manager


def managed(model, call, ids, manager, **rest):
    """Logits of a model, or of what calls it, under a manager; and the slots that are left."""
    with manager.attach(model) as cache:
        logits = call(ids, past_key_values=cache, **rest).logits
        return logits, [layer.slots for layer in cache.layers]


class Watching:
    """Decides as a manager, and keeps what it saw and said."""

    def __init__(self, manager):
        self.manager, self.observes, self.schedule, self.seen = manager, manager.observes, manager.schedule, []

    def decide(self, view):
        decision = self.manager.decide(view)
        self.seen.append((view, decision))
        return decision


# ---- half precision --------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", HALVES)
def test_logits_are_those_of_single_precision_up_to_rounding(name, dtype):
    """Of the same rounded weights; with a manager that keeps all, and with none.

    Most logits are within an eps. A few depend on a softmax that almost ties, and move as far as they do in single
    precision when every weight moves by half an eps.
    """
    half, eps = copy.deepcopy(MODELS[name]).to(dtype), torch.finfo(dtype).eps
    ids, single = ids_of(0, 24), copy.deepcopy(half).float()
    moved = copy.deepcopy(single)
    for weight in moved.parameters():
        weight.mul_(1 + eps / 2 * torch.randn_like(weight))
    for manager in (None, build("full", every=3)):
        wanted, other, got = (
            model(ids).logits if manager is None else managed(model, model, ids, manager)[0]
            for model in (single, moved, half)
        )
        assert got.dtype == dtype
        error, movement = (got.float() - wanted).abs(), (other - wanted).abs()
        assert float(error.median()) <= eps * float(wanted.abs().max())
        assert float(error.max()) <= 3 * float(movement.max())


@pytest.mark.parametrize("factor", [1, 30])
def test_products_beyond_fp16_do_not_overflow(factor):
    """Queries times keys of the window, as those of the memory, are fp32."""
    half = tiny_matrix()
    for block in half.blocks:
        for projection in (block.attention.q_proj, block.attention.k_proj):
            projection.weight.mul_(factor * 10)
    half = half.half()
    wanted, got = copy.deepcopy(half).float()(ids_of(1, 12)).logits, half(ids_of(1, 12)).logits
    assert float((got.float() - wanted).abs().max() / wanted.abs().max()) <= 0.05


@every_model
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_decisions_are_those_of_single_precision_on_the_same_numbers(name, dtype):
    model, manager = copy.deepcopy(MODELS[name]).to(dtype), evicting()
    policy = Watching(manager)
    model(ids_of(2, 24), past_key_values=model.decided_cache(policy))
    evicted = 0
    for view, decision in policy.seen:
        assert all(view.recorded[what].dtype == torch.float32 for what in ("frequency", "relevance:4"))
        again = manager.decide(view.map(lambda part: part.float() if part.is_floating_point() else part))
        assert torch.equal(decision.keep, again.keep)
        evicted += int((view.valid & ~decision.keep).sum())
    assert evicted > 0


# ---- padding ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("spec", [None, "full(every=3)", EVICTING])
def test_padding_on_the_left_is_not_there(name, spec):
    """A decision falls due where it is counted with padding; so the padding is of one length of turns."""
    model, ids, pad, every = MODELS[name], ids_of(3, 20), 6, 3
    padded = torch.cat((ids_of(4, pad), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    manager = None if spec is None else build(spec) if spec.startswith("full") else evicting(every=every)
    if manager is None:
        whole, alone = model(padded, attention_mask=mask).logits, model(ids).logits
    else:
        (whole, slots), (alone, others) = (
            managed(model, model, padded, manager, attention_mask=mask), managed(model, model, ids, manager),
        )  # fmt: skip
        assert all(torch.equal(torch.where(a >= 0, a - pad, -1), b) for a, b in zip(slots, others, strict=True))
    assert float((whole[:, pad:] - alone).abs().max() / alone.abs().max()) <= 1e-5


@every_model
def test_padding_on_the_right_is_not_there_or_refused(name):
    model, ids = MODELS[name], ids_of(5, 12)
    padded = torch.cat((ids, ids_of(6, 4)), 1)
    mask = torch.ones_like(padded)
    mask[:, 12:] = 0
    for manager in (None, evicting()):
        cache = None if manager is None else model.decided_cache(manager)
        if name == "matrix":
            logits = model(padded, attention_mask=mask, past_key_values=cache).logits[:, :12]
            other = None if manager is None else model.decided_cache(manager)
            torch.testing.assert_close(logits, model(ids, past_key_values=other).logits, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(CacheError, match="pad on the left"):
                model(padded, attention_mask=mask, past_key_values=cache)


# ---- compiled --------------------------------------------------------------------------------------------------------


@every_model
def test_compiled_it_answers_the_same_to_the_bit(name):
    """One layer of it, which is compiled in a fifth of the time; before a manager is attached, and under it."""
    one_layer = {"num_hidden_layers": 1}
    model = tiny_matrix(**one_layer) if name == "matrix" else tiny_mosaic(name, **one_layer)
    ids, manager = ids_of(7, 6, rows=1), build("knorm(budget=2, every=6)")
    stock, (wanted, slots) = model(ids).logits, managed(model, model, ids, manager)
    assert {part.shape[2] for part in slots} == {2}
    (layer,) = model.blocks if name == "matrix" else model.layers
    torch.compiler.reset()
    try:
        layer.compile(backend="eager")
        assert torch.equal(model(ids).logits, stock)
        logits, others = managed(model, model, ids, manager)
        assert torch.equal(logits, wanted)
        assert all(torch.equal(a, b) for a, b in zip(slots, others, strict=True))
    finally:
        torch.compiler.reset()


# ---- a damaged folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda tensors, key: tensors.pop(key), "missing in the files, would be random: .*memory.initial"),
        (lambda tensors, key: tensors[key].view(-1)[3:5].fill_(torch.nan), "initial: 2 of .* numbers are NaN"),
        (lambda tensors, key: tensors.update({f"{key}_2": tensors[key].clone()}), "the model has no place for it"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(harm, message, tmp_path):
    (where,) = (info.where for info in available() if info.name == "zoo-memory-matrix")
    shutil.copytree(where, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    harm(tensors, "blocks.1.attention.memory.initial")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path / "model"))
