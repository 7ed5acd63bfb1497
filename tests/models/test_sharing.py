"""Sharing: weights and contexts come out of memory that others see, too, equal to the bit and never written to."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomem.errors import ModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT
from evomem.evaluation.objectives import Attention
from evomem.evaluation.store import PrefillStore
from evomem.managers import build
from evomem.models import LoadedModel, load
from evomem.models.loading import ALIGNMENT
from evomem.models.sharing import assemble, dismantle, to_array, to_tensor
from evomem.testing.models import FAMILIES, tiny, tiny_tokenizer
from evomem.workers.context_exchange import HELD, Directory, SharedReadings, nbytes, to_arrays, to_reading
from tests.evaluation.test_evaluation import TASK, make_sample

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KINDS = (
    "h2o",
    "snapkv(window=6)",
    "expected_attention",
    "adakv(keydiff)",
    "namm(scorer=bam, selection=capped)",
    "feature_scorer(knots=3, hidden=4, allocation=2)",
)
OBSERVES = frozenset({"attention_sum", "window_attention:8"})


def loaded(family="llama", dtype=torch.float32, **overrides):
    return LoadedModel("tiny", tiny(family, layers=2, **overrides).to(dtype), tiny_tokenizer(), "tiny")


def elsewhere(parts):
    """What another process gets: the arrays lie in memory that it must not write to, everything else is a copy."""
    buffers = []
    frame = pickle.dumps(parts, protocol=5, buffer_callback=buffers.append)
    # Ray's shared memory is aligned as PyTorch's is.
    shared = [torch.frombuffer(bytearray(buffer.raw()), dtype=torch.uint8).clone().numpy() for buffer in buffers]
    for memory in shared:
        memory.flags.writeable = False
    return pickle.loads(frame, buffers=shared), shared


def arrays_of(parts):
    return [array for array, _ in parts["arrays"].values()]


@TYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_put_together_again_is_the_same_to_the_bit(family, dtype):
    model = loaded(family, dtype)
    parts, shared = elsewhere(dismantle(model))
    again = assemble(parts, "cpu")
    tokens = torch.randint(4, 120, (2, 33))
    assert torch.equal(again.model(tokens).logits, model.model(tokens).logits)
    for mine, theirs in zip(again.model.named_parameters(), model.model.named_parameters(), strict=True):
        assert mine[0] == theirs[0]
        assert mine[1].dtype == dtype
        assert not mine[1].requires_grad
        weights = mine[1].view(torch.int16) if dtype is torch.bfloat16 else mine[1]
        assert any(np.shares_memory(weights.numpy(), memory) for memory in shared)
    assert not any(array.flags.writeable for array in arrays_of(parts))
    assert not again.model.training
    assert (again.name, again.digest) == (model.name, model.digest)
    assert again.tokenizer.encode("the red cat") == model.tokenizer.encode("the red cat")
    settings = model.model.generation_config.to_dict()
    assert again.model.generation_config.to_dict() == settings


def test_weights_of_a_mapped_file_and_shared_ones_lie_where_sums_go_in_the_same_order(tmp_path):
    tiny("llama", layers=2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load(str(tmp_path), device="cpu")
    again = assemble(elsewhere(dismantle(model))[0], "cpu")
    for one in (model, again):
        assert not any(weights.data_ptr() % ALIGNMENT for weights in one.model.parameters())
    tokens = torch.randint(4, 120, (3, 41))
    assert torch.equal(again.model(tokens).logits, model.model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt_neox"])
def test_tied_weights_stay_one(family):
    model = loaded(family, tie_word_embeddings=True)
    parts, _ = elsewhere(dismantle(model))
    assert len(parts["arrays"]) < len(parts["names"])
    again = assemble(parts, "cpu").model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.model.parameters())
    tokens = torch.randint(4, 120, (1, 9))
    assert torch.equal(again(tokens).logits, model.model(tokens).logits)


def test_what_is_not_in_memory_is_refused():
    model = loaded()
    layer = model.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight.*device_map"):
        dismantle(model)
    parts = dismantle(loaded())
    del parts["names"]["lm_head.weight"]
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        assemble(parts, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_arrays_are_the_tensors(dtype):
    tensor = torch.randn(3, 4, 5).mul(3).to(dtype)[:, 1:3].transpose(0, 1)
    array, name = to_array(tensor)
    assert torch.equal(to_tensor(array, name), tensor)
    assert to_tensor(array, name).dtype == dtype


@TYPES
def test_evaluations_on_memory_that_cannot_be_written_to(dtype):
    """Every kind of manager: on the own model and store, and on the weights and contexts of another process."""
    model, sample = loaded(dtype=dtype), make_sample(3)
    parts, weights = elsewhere(dismantle(model))
    before = [memory.copy() for memory in weights]
    given_away: dict[str, dict] = {}
    for spec in KINDS:
        kinds = [build(spec, budget=budget) for budget in (8, 12)]
        own = Evaluator(model, store=PrefillStore())
        expected = own.evaluate(kinds, sample, TASK, EXACT)
        reader = SharedReadings(given_away.__getitem__)
        assert numbers(Evaluator(assemble(parts, "cpu"), store=reader).evaluate(kinds, sample, TASK, EXACT)) == (
            numbers(expected)
        )
        fresh = reader.give()
        assert len(fresh) == reader.misses == 1
        contexts, memories = elsewhere(fresh)
        stored = [memory.copy() for memory in memories]
        given_away.update(contexts)
        other = SharedReadings(given_away.__getitem__)
        other.offer({key: key for key in contexts})
        found = Evaluator(assemble(parts, "cpu"), store=other).evaluate(kinds, sample, TASK, EXACT)
        assert numbers(found) == numbers(expected)
        assert other.misses == other.lost == 0
        assert all(np.array_equal(*pair) for pair in zip(memories, stored, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(weights, before, strict=True))


def numbers(evaluations):
    """Everything but the effort."""
    return [(e.loglik, e.exact, e.slots, e.bytes_peak, e.bytes_mean, e.values) for e in evaluations]


@TYPES
def test_a_reading_comes_out_as_it_went_in(dtype):
    evaluator, sample = Evaluator(loaded(dtype=dtype)), make_sample(5)
    tokens = evaluator.tokens(sample)
    evaluator.evaluate(
        [build("keydiff", budget=8)], sample, TASK, Attention.measurement.observing(OBSERVES)
    )  # leaves a memo
    reading = evaluator.reading(tokens.read, OBSERVES | build("keydiff", budget=8).observes)
    arrays, memories = elsewhere(to_arrays(reading))
    again = to_reading(arrays)
    assert again.tokens == reading.tokens
    assert len(again.views) == len(reading.views)
    for mine, theirs in zip(again.views, reading.views, strict=True):
        for name in ("keys", "values", "slots", "start"):
            same(getattr(mine, name), getattr(theirs, name))
        assert (mine.seen, mine.fresh, mine.layer, mine.layers) == (
            theirs.seen,
            theirs.fresh,
            theirs.layer,
            theirs.layers,
        )
        assert mine.recorded.keys() == theirs.recorded.keys() >= OBSERVES
        assert mine.memo.keys() == theirs.memo.keys()
        assert any(name.startswith("future/") for name in mine.memo)
        for group in ("recorded", "memo"):
            for name, tensor in getattr(mine, group).items():
                same(tensor, getattr(theirs, group)[name])
        keys = mine.keys.view(torch.int16) if dtype is torch.bfloat16 else mine.keys
        assert any(np.shares_memory(keys.numpy(), memory) for memory in memories)
    assert nbytes(arrays) == reading.nbytes()
    assert nbytes(arrays) <= sum(memory.nbytes for memory in memories)


def same(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


def test_what_is_lost_is_read_again():
    evaluator, sample = Evaluator(loaded()), make_sample(7)
    read = evaluator.tokens(sample).read
    reads = []

    def now():
        reads.append(1)
        return evaluator._read(read, frozenset())

    def gone(where):
        raise OSError("its machine has died")

    store = SharedReadings(gone)
    store.offer({"a": None})
    first = store.get("a", now)
    assert (len(reads), store.lost, store.misses) == (1, 1, 1)
    assert store.get("a", now) is first  # held
    for key in map(str, range(HELD)):
        store.get(key, now)
    store.get("a", now)  # not held any more
    assert len(reads) == 2 + HELD
    assert store.give().keys() == {"a", *map(str, range(HELD))}
    assert store.give() == {}
    store.close()
    store.get("a", now)
    assert len(reads) == 3 + HELD


@given(
    limit=st.integers(0, 60),
    events=st.lists(
        st.tuples(
            st.sampled_from(["add", "use", "forget"]), st.sampled_from("abcd"), st.integers(0, 2), st.integers(1, 30)
        )
    ),
)
def test_directory_against_a_plain_list(limit, events):
    """The samples used last whose readings fit together, in a list, the newest at its end."""
    directory, plain = Directory(limit), []
    for what, affinity, key, size in events:
        found = next((entry for entry in plain if entry[0] == affinity), None)
        if found is not None:
            plain.remove(found)
        if what == "add":
            found = found or (affinity, {})
            found[1][key] = size
            plain.append(found)
            while sum(sum(sizes.values()) for _, sizes in plain) > limit:
                plain.pop(0)
            assert directory.add(affinity, key, ("where", affinity, key), size) is (found in plain)
        elif what == "use":
            offers = directory.offers(affinity)
            assert offers.keys() == (found[1].keys() if found else set())
            assert all(where == ("where", affinity, key) for key, where in offers.items())
            plain += [found] if found else []
        else:
            directory.forget(affinity)
        assert directory.size == sum(sum(sizes.values()) for _, sizes in plain) <= limit
