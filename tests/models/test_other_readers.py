"""A memory that another configuration has read, several texts in a row, two caches at once: every model refuses.

Masks that contradict what was read: `tests/models/test_later_masks.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from evomem.errors import CacheError, ModelError
from evomem.managers import build
from evomem.memory.explicit.feedback import FeedbackCache
from evomem.memory.explicit.neural import NeuralCache
from tests.models import test_fam, test_fam_around, test_memory_models, test_titans
from tests.models.test_mosaic import tiny_mosaic

MODELS = test_memory_models.MODELS | {"fam": test_fam.tiny_fam(), "mag": test_titans.MODELS["mag"]}
MODELS["around"] = test_fam_around.around(test_fam_around.decoder())
every_model = pytest.mark.parametrize("name", MODELS)
IDS = test_fam.ids_of(0, 10)


# ---- another configuration -------------------------------------------------------------------------------------------


def titans(**changes):
    return test_titans.tiny(**{"variant": "mag", **changes})


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (titans, "variant", "lmm"), (titans, "variant", "mac"), (titans, "segment", 3), (titans, "window", 3),
        (titans, "conv", 2), (titans, "rate", 2.0), (titans, "num_attention_heads", 4),
        (test_fam.tiny_fam, "feedback", 0), (test_fam.tiny_fam, "feedback", 1), (test_fam.tiny_fam, "block", 2),
        (test_fam.tiny_fam, "segments", 0),
    ],
)  # fmt: skip
def test_a_memory_of_another_configuration_is_refused(make, field, value):
    """Most of these fit, tensor by tensor, and would say something else; as they are, and from a file."""
    model, reader = MODELS["mag" if make is titans else "fam"], make(**{field: value})
    read = reader(IDS[:, :6]).past_key_values
    saved = type(read).of(load(save({name: part.contiguous() for name, part in read.tensors().items()})), 2)
    for cache in (read, saved):
        with pytest.raises(CacheError, match=rf"read with {field} .*read on with"):
            model(IDS[:, 6:], past_key_values=cache)
    one, two = (reader(IDS[:, 6:], past_key_values=cache).logits for cache in (read, saved))  # they are as they were
    assert torch.equal(one, two)
    read.reset()
    model(IDS[:, :1], past_key_values=read)


def test_a_memory_of_as_many_numbers_and_another_depth_is_refused():
    """Four matrices of d² are as many numbers as two of 2 d²."""
    cache = titans(depth=4)(IDS[:, :6]).past_key_values
    with pytest.raises(CacheError, match="read with depth 4, and the model has 2"):
        titans(depth=2, expansion=2)(IDS[:, 6:], past_key_values=cache)


DECIDED = {
    "fam": test_fam.tiny_fam, "matrix": test_memory_models.tiny_matrix,
    "v1": lambda **sizes: tiny_mosaic("v1", **sizes), "v2": lambda **sizes: tiny_mosaic("v2", **sizes),
}  # fmt: skip
"""Models whose memories a manager may decide about, by how they are made."""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("fam", {"feedback": 2}), ("fam", {"block": 2}), ("fam", {"segments": 2}), ("matrix", {"rule": "leaky"}),
        ("matrix", {"matrix_layers": [0]}), ("v1", {"persistent_size": 7}), ("v2", {"short_window": 3}),
        ("v2", {"long_delay": 2}),
    ],
)  # fmt: skip
def test_slots_of_another_configuration_are_refused(name, other):
    """As they are, cloned, and from a state; most fit, tensor by tensor, and would say something else."""
    reader, ids = DECIDED[name](**other), test_fam.ids_of(0, 14)
    cache, again = reader.decided_cache(build("full")), reader.decided_cache(build("full"))
    reader(ids[:, :10], past_key_values=cache)
    again.load_state(*cache.state())
    for read in (cache, copy.deepcopy(cache), again):
        with pytest.raises(CacheError, match="read on with the model that began"):
            MODELS[name](ids[:, 10:], past_key_values=read)
    one, two = (reader(ids[:, 10:], past_key_values=read).logits for read in (cache, again))  # they are as they were
    assert torch.equal(one, two)
    cache.reset()
    reader(ids[:, :4], past_key_values=cache)


@pytest.mark.parametrize("name", DECIDED)
def test_a_state_of_slots_says_who_has_read_them(name):
    model, ids = MODELS[name], test_fam.ids_of(0, 14)
    cache, again = model.decided_cache(build("full")), model.decided_cache(build("full"))
    model(ids[:, :10], past_key_values=cache)
    facts, tensors = cache.state()
    with pytest.raises(CacheError, match="'reader' is no configuration"):
        again.load_state(facts, tensors | {"reader": torch.zeros(3)})
    del tensors["reader"]
    again.load_state(facts, tensors)
    with pytest.raises(CacheError, match="'reader' is missing"):
        model(ids[:, 10:], past_key_values=again)


def test_caches_of_other_layers_are_refused_before_they_are_begun():
    model = MODELS["fam"]
    for cache in (
        FeedbackCache(1),
        FeedbackCache(3),
        test_fam.tiny_fam(num_hidden_layers=1).decided_cache(build("full")),
    ):
        with pytest.raises(ModelError, match=r"of 2 layers was given a .* of [13] layers"):
            model(IDS, past_key_values=cache)
        assert cache.layers[0].start is None or not cache.get_seq_length()


@pytest.mark.parametrize(("make", "kind"), [(titans, NeuralCache), (test_fam.tiny_fam, FeedbackCache)])
def test_a_saved_memory_says_who_has_read_it(make, kind):
    model = make()
    tensors: dict[str, Any] = model(IDS[:, :6]).past_key_values.tensors()
    for broken in (
        torch.zeros(3),
        torch.tensor([123, 125, 200], dtype=torch.uint8),
        torch.zeros((), dtype=torch.uint8),
    ):
        with pytest.raises(CacheError, match="'reader' is no configuration"):
            kind.of(tensors | {"reader": broken}, 2)
    del tensors["reader"]
    with pytest.raises(CacheError, match="'reader' is missing"):
        model(IDS[:, 6:], past_key_values=kind.of(tensors, 2))


# ---- several texts in one row, masks, two caches ---------------------------------------------------------------------


@every_model
def test_several_texts_in_one_row_are_refused(name):
    """Its memory would go on from one text to the next."""
    model, mask = MODELS[name], torch.ones_like(IDS)
    for wrong in (torch.cat((mask[:, :5], 2 * mask[:, 5:]), 1), torch.full((2, 10), torch.nan), -1e9 * mask.double()):
        with pytest.raises(ModelError, match="other numbers than 0"):
            model(IDS, attention_mask=wrong)
    with pytest.raises(ModelError, match="fall within a row"):
        model(IDS, position_ids=torch.arange(10)[None] % 5)
    for wrong in (torch.zeros(1, 1).long(), torch.arange(7)[None], torch.arange(10), torch.arange(10.0)[None]):
        with pytest.raises(ModelError, match="position_ids of shape"):
            model(IDS, position_ids=wrong)
    mask[0, :3] = 0
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as `generate` makes them: 1 1 1 0 1 2 ...
    wanted = model(IDS, attention_mask=mask).logits
    given = model(IDS, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(given[:, 3:], wanted[:, 3:], rtol=1e-4, atol=1e-5)


@every_model
def test_two_caches_at_once_are_refused(name):
    model = MODELS[name]
    cache, other = model.new_cache(), model.new_cache()
    with pytest.raises(ModelError, match="leave one out"):
        model(IDS, past_key_values=cache, cache=other)
    assert torch.equal(model(IDS, past_key_values=cache, cache=cache).logits, model(IDS).logits)


@every_model
def test_a_memory_that_gradients_run_through_is_copied(name):
    """As the refusal to take tokens back advises."""
    model = copy.deepcopy(MODELS[name]).requires_grad_(True)
    cache = model(IDS[:, :6]).past_key_values
    other = copy.deepcopy(cache)
    one, two = (model(IDS[:, 6:], past_key_values=kept).logits for kept in (cache, other))
    assert torch.equal(one, two)
    assert cache.get_seq_length() == other.get_seq_length() == 10


# ---- a state of slots that somebody has changed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "harm", "message"),
    [
        ("even.values", lambda x: x * torch.nan, "even.values of numbers"),
        ("even.keys", lambda x: x.long(), "even.keys of numbers"),
        ("window_keys", lambda x: x * torch.nan, "no number"), ("window_keys", lambda x: x.long(), "window"),
        ("window_keys", lambda x: x[:, :, 1:], "window"), ("window_real", lambda x: x.float(), "window"),
        ("even.number", lambda x: x + 77, "no slot of the model's 3"), ("even.number", lambda x: x * 0, "no slot"),
    ],
)  # fmt: skip
def test_a_changed_state_of_slots_is_refused(part, harm, message):
    model, manager = MODELS["fam"], build("lru", budget=2, every=4)
    cache, again = model.decided_cache(manager), model.decided_cache(manager)
    model(IDS, past_key_values=cache)
    facts, tensors = cache.state()
    again.load_state(facts, tensors)
    with pytest.raises(CacheError, match=message):
        again.load_state(facts, tensors | {f"0.{part}": harm(tensors[f"0.{part}"])})
    with pytest.raises(CacheError, match="decided"):
        again.load_state([facts[0] | {"decided": 11}, *facts[1:]], tensors)


@every_model
def test_a_cache_that_is_not_to_be_used_is_refused_by_generate(name):
    """transformers would give the whole text again with every token, and the memory take it in each time."""
    model = MODELS[name]
    cache = model(IDS[:, :4]).past_key_values
    with pytest.raises(ModelError, match="use_cache=False: its memory would read the text again"):
        model.generate(IDS, past_key_values=cache, use_cache=False, max_new_tokens=3, do_sample=False)
    whole = model.generate(IDS, use_cache=False, max_new_tokens=3, do_sample=False)
    assert torch.equal(whole, model.generate(IDS, max_new_tokens=3, do_sample=False))


@every_model
def test_assisted_generation_is_refused(name):
    with pytest.raises(ValueError, match="assisted generation"):
        MODELS[name].generate(IDS, prompt_lookup_num_tokens=2, max_new_tokens=3, do_sample=False)
