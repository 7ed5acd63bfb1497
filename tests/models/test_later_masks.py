"""Masks of models that read on: about all tokens or the new ones, never against what was read with another padding."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from safetensors.torch import load, save

from evomem.errors import CacheError, ModelError
from evomem.managers import build
from evomem.memory.explicit.matrix import MatrixCache
from tests.models import test_fam, test_fam_around, test_memory_models, test_titans

MODELS = test_memory_models.MODELS | {"fam": test_fam.tiny_fam(), "mag": test_titans.MODELS["mag"]}
MODELS["around"] = test_fam_around.around(test_fam_around.decoder())
IDS = test_fam.ids_of(0, 10)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
"""Row 0 has two tokens of padding."""
CACHES = [*((name, False) for name in MODELS), ("matrix", True), ("v1", True), ("v2", True)]
"""Models, and whether a manager decides; a feedback memory that is decided about takes no padding."""
every_cache = pytest.mark.parametrize(("name", "decided"), CACHES)


def new_cache(name, decided):
    return MODELS[name].decided_cache(build("full", every=2)) if decided else MODELS[name].new_cache()


@every_cache
def test_a_mask_about_the_new_tokens_says_as_much_as_one_about_all(name, decided):
    """And as reading every row by itself, without padding; also where a row has read nothing but padding yet."""
    model = MODELS[name]
    for cuts in ((0, 6, 10), (0, 1, 3, 10)):
        whole, new = new_cache(name, decided), new_cache(name, decided)
        logits = []
        for begin, end in itertools.pairwise(cuts):
            one = model(IDS[:, begin:end], attention_mask=LEFT[:, :end], past_key_values=whole).logits
            two = model(IDS[:, begin:end], attention_mask=LEFT[:, begin:end], past_key_values=new).logits
            assert torch.equal(one, two)
            logits.append(one)
        got = torch.cat(logits, 1)
        for row, pad in enumerate((2, 0)):
            alone = model(IDS[row : row + 1, pad:], past_key_values=new_cache(name, decided)).logits[0]
            torch.testing.assert_close(got[row, pad:], alone, rtol=1e-4, atol=1e-5)


@every_cache
def test_a_mask_that_contradicts_what_was_read_is_refused(name, decided):
    model, cache = MODELS[name], new_cache(name, decided)
    model(IDS[:, :6], attention_mask=LEFT[:, :6], past_key_values=cache)
    again = copy.deepcopy(cache)
    both = torch.cat((LEFT[:1], LEFT[:1]))
    more = LEFT.clone()
    more[0, 2] = 0
    for wrong, error, message in (
        (torch.ones_like(LEFT), CacheError, "other padding than the tokens were read with"),
        (both, CacheError, "other padding than the tokens were read with"),
        (more, CacheError, "other padding than the tokens were read with"),
        (LEFT[:, 3:], ModelError, "about 7 tokens"), (LEFT[:, 1:], ModelError, "about 9 tokens"),
        (torch.ones(2, 13), ModelError, "about 13 tokens"),
        (LEFT[:, :4], CacheError, "padding (behind|between)"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            model(IDS[:, 6:], attention_mask=wrong, past_key_values=cache)
    one, two = (model(IDS[:, 6:], attention_mask=LEFT, past_key_values=kept).logits for kept in (cache, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize("decided", [False, True])
def test_a_row_of_a_matrix_that_has_ended_is_not_read_on(decided):
    """Padding on the right is harmless as long as nothing comes behind it, whatever a later mask says, or none."""
    model, cache, open_row = MODELS["matrix"], new_cache("matrix", decided), new_cache("matrix", decided)
    ends = torch.ones(2, 6, dtype=torch.int64)
    ends[0, 4:] = 0
    model(IDS[:, :6], attention_mask=ends, past_key_values=cache)
    caches = [cache, copy.deepcopy(cache), new_cache("matrix", decided)]
    if decided:
        caches[2].load_state(*cache.state())
    else:
        caches[2] = MatrixCache.of(load(save({name: part.contiguous() for name, part in cache.tensors().items()})), 2)
    new = torch.ones(2, 4, dtype=torch.int64)
    for read in caches:
        for mask, message in (
            (None, "padding between tokens"), (new, "padding between tokens"),
            (torch.cat((ends, new), 1), "padding between tokens"), (torch.ones_like(LEFT), "other padding"),
        ):  # fmt: skip
            with pytest.raises(CacheError, match=message):
                model(IDS[:, 6:], attention_mask=mask, past_key_values=read)
    new[0] = 0
    model(IDS[:, :6], past_key_values=open_row)
    wanted = model(IDS[:, 6:], past_key_values=open_row).logits[1:]
    got = model(IDS[:, 6:], attention_mask=new, past_key_values=caches[1]).logits[1:]  # row 0 goes on with padding
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(model(IDS[1:, 6:], past_key_values=cache).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_window_of_one_token_takes_no_padding_on_the_right():
    """It keeps nothing by which a row that has ended could be told later."""
    config = MODELS["matrix"].config.to_dict() | {"window": 1}
    model = type(MODELS["matrix"])(type(MODELS["matrix"].config)(**config)).eval()
    ends = torch.ones_like(IDS)
    ends[0, 8:] = 0
    with pytest.raises(CacheError, match="pad on the left"):
        model(IDS, attention_mask=ends)
    cache = model(IDS[:, :6], attention_mask=LEFT[:, :6]).past_key_values
    with pytest.raises(CacheError, match="padding behind"):
        model(IDS[:, 6:], attention_mask=LEFT[:, :4], past_key_values=cache)


@pytest.mark.parametrize("name", ["matrix", "v1", "v2", "fam", "mag"])
def test_a_saved_memory_says_where_its_rows_begin(name):
    model = MODELS[name]
    tensors = model(IDS[:, :6], attention_mask=LEFT[:, :6]).past_key_values.tensors()
    kind, layers = type(model.new_cache()), len(model.new_cache().layers)
    kind.of(tensors, layers)
    for wrong, message in (
        (torch.tensor([7, 0]), "start"), (torch.tensor([-1, 0]), "start"), (torch.tensor([1, 0]), "begin elsewhere"),
        (torch.tensor([2]), "start"), (torch.tensor([2.0, 0.0]), "start"),
    ):  # fmt: skip
        with pytest.raises(CacheError, match=message):
            kind.of(tensors | {"1.start": wrong}, layers)
    with pytest.raises(CacheError, match="'start' is missing"):
        kind.of({key: part for key, part in tensors.items() if not key.endswith(".start")}, layers)
