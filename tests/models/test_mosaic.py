"""Memory Mosaics: the model against loops, and the memory against reading everything again."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from evomem.errors import CacheError, ConfigError
from evomem.models import load
from evomem.models.architectures.mosaic import MemoryMosaic, MosaicConfig
from evomem.models.architectures.mosaic_cache import MosaicCache, UnitMemory
from evomem.models.architectures.mosaic_memory import (
    bandwidth,
    leaky_average,
    read_pairs,
    read_weights,
    readable,
    unit_norm,
)
from evomem.models.architectures.mosaic_units import ContextualUnit, FixedBandwidth, LeakyKeys, PeekingValues
from experiments.zoo.data import zoo_tokenizer
from tests.support.slow_mosaic import leaky, slow_logits

VOCABULARY = 30


def tiny_mosaic(form: str, *, seed: int = 0, **sizes) -> MemoryMosaic:
    """A random model in eval mode whose gates, decays, shares and bandwidths all differ, and matter."""
    torch.manual_seed(seed)
    sizes = {"persistent_size": 10, "short_window": 5, "long_delay": 4, "longest_delay": 7} | sizes
    config = MosaicConfig(form=form, vocab_size=VOCABULARY, hidden_size=24, num_attention_heads=3, **sizes)
    model = MemoryMosaic(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] != "norm" and "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.05))
    return model.requires_grad_(False)


def tokens(rows: int, length: int, seed: int = 0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["v1", "v2"])
def mosaic(request):
    return tiny_mosaic(request.param)


# ---- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_logits_are_those_of_loops(form):
    model = tiny_mosaic(form).double()
    ids = tokens(2, 14)
    slow = torch.stack([slow_logits(model, row.tolist()) for row in ids])
    assert float((model(ids).logits - slow).abs().max()) <= 1e-9 * float(slow.abs().max())


@examples(max_examples=20)
@given(length=st.integers(1, 150), seed=st.integers(0, 100), shared=st.booleans())
def test_leaky_averages_are_those_of_loops(length, seed, shared):
    torch.manual_seed(seed)
    inputs = torch.randn(2, 3, length, 4, dtype=torch.float64)
    decay = -torch.rand(1 if shared else 2, 3, 1 if shared else length, dtype=torch.float64) * 3
    averages, state = leaky_average(inputs, decay, torch.zeros(2, 3, 4, dtype=torch.float64))
    wide = decay.exp().expand(2, 3, length)
    for row in range(2):
        for head in range(3):
            slow = leaky(list(inputs[row, head]), wide[row, head].tolist())
            torch.testing.assert_close(averages[row, head], torch.stack(slow))
            torch.testing.assert_close(state[row, head], slow[-1])


def test_a_decay_of_one_sums_and_one_of_zero_forgets():
    inputs = torch.randn(1, 2, 100, 3)
    summed, _ = leaky_average(inputs, torch.zeros(1, 2, 1), torch.zeros(1, 2, 3))
    torch.testing.assert_close(summed, inputs.cumsum(2), atol=1e-4, rtol=1e-4)
    last, _ = leaky_average(inputs, torch.full((1, 2, 1), -1e4), torch.zeros(1, 2, 3))
    torch.testing.assert_close(last, inputs)


def test_weights_sum_to_one_or_are_none():
    keys = unit_norm(torch.randn(2, 3, 9, 4))
    slots = torch.arange(9).where(torch.arange(9) != 0, -1)[None, None]
    allowed = readable(slots, torch.arange(9), 2, 5)
    weights = read_weights(keys, keys, allowed, torch.full((1, 3, 1), 7.0))
    assert allowed[0, 0].tolist() == [[i != 0 and 2 <= t - i <= 5 for i in range(9)] for t in range(9)]
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).float().expand(2, 3, 9))
    assert not weights.masked_fill(allowed, 0).any()
    values = torch.randn(2, 3, 9, 5)
    read = read_pairs(keys, keys, values, allowed, torch.full((1, 3, 1), 7.0))
    torch.testing.assert_close(read, weights @ values)


def test_the_bandwidth_grows_with_the_pairs():
    pairs = torch.tensor([[[0, 1, 8, 27]]])
    slope, offset, power = (torch.tensor([one]) for one in (2.0, 3.0, 1 / 3))
    torch.testing.assert_close(bandwidth(pairs, slope, offset, power), torch.tensor([[[5.0, 5.0, 7.0, 9.0]]]))
    torch.testing.assert_close(bandwidth(pairs, slope, offset, power * 0), torch.full((1, 1, 4), 5.0))


def test_no_token_changes_what_was_said_before_it(mosaic):
    ids = tokens(1, 20)
    said = mosaic(ids).logits
    for place in range(1, 20):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        changed = mosaic(other).logits
        assert torch.equal(changed[:, :place], said[:, :place]), place
        assert not torch.equal(changed[:, place], said[:, place])


def test_gradients_are_numbers_and_do_not_flow_back_in_time(mosaic):
    vectors = torch.randn(1, 12, 24, requires_grad=True)
    unit = mosaic.layers[0].contextual[0]
    unit(vectors, None, UnitMemory())[0, 6].sum().backward()
    flowing = vectors.grad.abs().sum(-1)[0] > 0
    assert flowing.tolist() == [True] * 7 + [False] * 5
    assert bool(vectors.grad.isfinite().all())


def test_one_unit_copies_what_followed():
    """One contextual unit is an induction head (v1, section 5): what followed the earlier same token comes out."""
    width = 12
    unit = ContextualUnit(LeakyKeys(width, 1), PeekingValues(width, 1), FixedBandwidth(1))
    with torch.no_grad():
        for part in (unit.keys, unit.values):
            part.projection.weight.copy_(torch.eye(width))
        unit.keys.decay.fill_(5.0)  # a key knows its own token only
        unit.values.share.zero_()  # a value knows the next token only
        unit.values.scale.zero_()
        unit.bandwidth.scale.fill_(0.2)
    ids = torch.randperm(width)[None, :9].repeat(1, 2)
    said = unit(torch.eye(width)[ids], None, UnitMemory()).argmax(-1)
    # In the second copy, at each token, what followed it in the first.
    assert torch.equal(said[0, 9:17], ids[0, 10:18])


# ---- memory; in fp64, so that an order of sums is no excuse ------------------------------------------------------


MODELS = {form: tiny_mosaic(form).double() for form in ("v1", "v2")}


@examples(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(["v1", "v2"]), cuts=st.lists(st.integers(1, 29), max_size=5),
    padding=st.lists(st.integers(0, 12), min_size=2, max_size=2),
)  # fmt: skip
def test_pieces_and_padding_change_nothing(form, cuts, padding):
    model = MODELS[form]
    ids, length = tokens(2, 30, seed=3), 30
    real = torch.arange(length) >= torch.tensor(padding)[:, None]
    whole = model(ids, attention_mask=real.long()).logits
    for row, pad in enumerate(padding):
        torch.testing.assert_close(whole[row, pad:], model(ids[row : row + 1, pad:]).logits[0])
    cache, parts = model.new_cache(), []
    for begin, end in zip(sorted({0, *cuts}), [*sorted({0, *cuts})[1:], length], strict=True):
        passed = model(ids[:, begin:end], attention_mask=real[:, :end].long(), past_key_values=cache)
        parts.append(passed.logits)
    assert passed.past_key_values is cache
    for row, pad in enumerate(padding):
        torch.testing.assert_close(torch.cat(parts, 1)[row, pad:], whole[row, pad:])


def test_a_saved_memory_goes_on_to_the_bit(mosaic, tmp_path):
    from safetensors.torch import load_file, save_file

    ids = tokens(2, 24)
    for cut in (1, 2, 3, 11):
        cache = mosaic.new_cache()
        mosaic(ids[:, :cut], past_key_values=cache)
        save_file({name: part.contiguous() for name, part in cache.tensors().items()}, tmp_path / "memory")
        resumed = MosaicCache.of(load_file(tmp_path / "memory"), mosaic.units)
        assert resumed.nbytes() == cache.nbytes()
        for begin, end in ((cut, cut + 1), (cut + 1, cut + 6), (cut + 6, 24)):
            going_on, again = (mosaic(ids[:, begin:end], past_key_values=one).logits for one in (cache, resumed))
            assert torch.equal(going_on, again)


@pytest.mark.parametrize("form", MODELS)
def test_rows_are_chosen_repeated_and_forgotten(form):
    mosaic = MODELS[form]
    ids = tokens(3, 16)
    cache = mosaic.new_cache()
    mosaic(ids[:, :10], past_key_values=cache)
    order = torch.tensor([2, 0])
    chosen, repeated, ordered = (copy.deepcopy(cache) for _ in range(3))
    chosen.batch_select_indices(order)
    repeated.batch_repeat_interleave(2)
    ordered.reorder_cache(torch.tensor([1, 1, 0]))
    for one, rows in ((chosen, order), (repeated, torch.arange(3).repeat_interleave(2)), (ordered, [1, 1, 0])):
        logits = mosaic(ids[rows][:, 10:], past_key_values=one).logits
        torch.testing.assert_close(logits, mosaic(ids[rows]).logits[:, 10:])
    cache.reset()
    assert cache.nbytes() == 0
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(mosaic(ids, past_key_values=cache).logits, mosaic(ids).logits)


def test_bytes_are_those_of_the_pairs():
    cache = MODELS["v1"].new_cache()
    assert cache.nbytes() == 0
    sizes = []
    for token in tokens(1, 6)[0]:
        MODELS["v1"](token[None, None], past_key_values=cache)
        sizes.append(cache.nbytes())
    # A pair of a unit: key and value of 24 numbers each, and where they are from.
    pair = 2 * 24 * 8 + 8
    assert {after - before for before, after in itertools.pairwise(sizes)} == {2 * pair}
    # A short memory lets pairs go that nobody reads any more.
    cache = MODELS["v2"].new_cache()
    MODELS["v2"](tokens(1, 40), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 39, 3, 39]


def test_tokens_cannot_be_taken_back(mosaic):
    cache = mosaic.new_cache()
    mosaic(tokens(1, 5), past_key_values=cache)
    cache.crop(0)
    with pytest.raises(CacheError, match="take tokens back"):
        cache.crop(-1)


def test_generate_takes_what_is_most_likely(mosaic):
    ids = tokens(2, 7)
    ids[0, :3] = 0
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made = mosaic.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, pad in enumerate((3, 0)):
        text = ids[row : row + 1, pad:]
        for _ in range(6):
            text = torch.cat((text, mosaic(text).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(made[row, pad:], text[0])
    beams = mosaic.generate(ids[1:], max_new_tokens=6, num_beams=3, do_sample=False)
    again = mosaic.generate(ids[1:], max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, again)
    cache = mosaic.new_cache()
    mosaic.generate(ids[1:], past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert cache.get_seq_length() == 12  # the last token that was made is not read


def test_a_folder_brings_the_model_back(mosaic, tmp_path):
    mosaic.save_pretrained(tmp_path)
    zoo_tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    ids = tokens(1, 9)
    assert torch.equal(loaded.model(ids).logits, mosaic(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_decided_in_fp32(mosaic, dtype):
    ids = tokens(1, 12)
    half = copy.deepcopy(mosaic).to(dtype)
    cache = half.new_cache()
    logits = half(ids, past_key_values=cache).logits
    assert logits.dtype == dtype
    assert cache.layers[0].average.dtype == torch.float32
    near = mosaic(ids).logits
    assert float((logits.float() - near).abs().mean()) <= 0.05 * float(near.abs().mean())


def test_the_delay_is_drawn_in_training_only():
    model = tiny_mosaic("v2", num_hidden_layers=1).train()
    ids = tokens(1, 30)
    assert len({tuple(model(ids).logits[0, -1].tolist()) for _ in range(20)}) == 4  # 4, 5, 6 or 7 tokens back
    assert torch.equal(model.eval()(ids).logits, tiny_mosaic("v2", num_hidden_layers=1)(ids).logits)


# ---- refused -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused(mosaic):
    from transformers import DynamicCache

    ids = tokens(2, 5)
    with pytest.raises(CacheError, match="DynamicCache"):
        mosaic(ids, past_key_values=DynamicCache())
    with pytest.raises(CacheError, match="layers"):
        mosaic(ids, past_key_values=MosaicCache(1))
    with pytest.raises(CacheError, match="pad on the left"):
        mosaic(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]))
    cache = mosaic.new_cache()
    mosaic(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="2 rows"):
        mosaic(ids[:1], past_key_values=cache)
    with pytest.raises(IndexError):
        mosaic(ids + VOCABULARY, past_key_values=cache)
    mosaic(ids, past_key_values=cache)  # it failed before anything was read


def test_a_pass_that_was_cut_short_is_not_gone_on_from(mosaic, monkeypatch):
    ids, cache = tokens(2, 5), mosaic.new_cache()

    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mosaic.layers[0].contextual[0].bandwidth, "forward", stops)
        with pytest.raises(KeyboardInterrupt):
            mosaic(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="cut short"):
        mosaic(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="cut short"):
        cache.tensors()
    cache.reset()
    mosaic(ids, past_key_values=cache)


@pytest.mark.parametrize(
    "sizes",
    [
        {"form": "v3"}, {"num_attention_heads": 5}, {"short_window": 1}, {"long_delay": 300}, {"long_delay": 0},
        {"num_hidden_layers": 0}, {"persistent_size": 0},
    ],
)  # fmt: skip
def test_sizes_that_make_no_mosaic_are_refused(sizes):
    with pytest.raises(ConfigError, match="mosaic"):
        MosaicConfig(**sizes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("seen", lambda part: -part, "count of tokens"),
        ("0.average", None, "'average' is missing"),
        ("0.next_key", None, "'next_key' is missing"),
        ("0.keys", None, "saved together"),
        ("0.values", lambda part: part[:, :, 1:], "'values' has shape"),
        ("0.slots", lambda part: part + 9, "were not read"),
        ("0.slots", lambda part: part.float(), "float32"),
        ("0.average", lambda part: part * torch.nan, "no number"),
        ("0.next_value", lambda part: part.long(), "int64"),
        ("0.next_real", lambda part: part.float(), "float32"),
        ("9.keys", lambda part: part, "no unit"),
    ],
)
def test_a_damaged_memory_is_refused(mosaic, name, change, message):
    cache = mosaic.new_cache()
    mosaic(tokens(2, 6), past_key_values=cache)
    tensors = cache.tensors()
    part = tensors.get(name, torch.zeros(1))
    tensors[name] = part if change is None else change(part)
    if change is None:
        del tensors[name]
    with pytest.raises(CacheError, match=message):
        MosaicCache.of(tensors, mosaic.units)
