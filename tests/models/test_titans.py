"""Titans in its four variants: against plain loops, in pieces, with padding, saved, generating, in half precision."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, DynamicCache

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.managers import build
from evomem.memory.explicit.matrix import MatrixCache
from evomem.memory.explicit.neural import NeuralCache, NeuralLayer
from evomem.models.architectures.titans import Titans, TitansConfig, Variant
from evomem.models.loading import load as load_model
from evomem.testing.pretend import PretendDevices
from experiments.zoo.data import zoo_tokenizer
from tests.support.slow_titans import SlowMix

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "window": 5, "segment": 4,
    "persistent": 2, "memory_heads": 2, "conv": 3, "initializer_range": 0.4, "gradient_limit": 1.0,
}  # fmt: skip
VARIANTS = get_args(Variant)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant, *, seed=0, **changes):
    """A random model in fp64, whose gates are all far from their ends."""
    torch.manual_seed(seed)
    model = Titans(TitansConfig(**{**SIZES, "variant": variant, **changes})).eval().double().requires_grad_(False)
    for block in model.blocks:
        block.memory.gates.bias.copy_(torch.linspace(-1, 1, 3 * block.memory.heads))
    return model


MODELS = {variant: tiny(variant) for variant in VARIANTS}


def ids_of(seed, tokens, batch=2):
    return torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(one, two, tolerance=1e-8):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


# ---- what it computes ------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 1, "conv": 1, "momentum": False, "memory_heads": 1, "persistent": 0},
        {"depth": 3, "forgetting": False, "segment": 1},
    ],
    ids=["whole", "bare", "token by token"],
)
def test_a_layer_is_that_of_plain_loops(variant, changes):
    model = tiny(variant, num_hidden_layers=1, **changes)
    block, (batch, tokens), segment = model.blocks[0], (2, 10), model.config.segment
    for part in block.parameters():
        part.add_(0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())))
    hidden = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer, mixed = NeuralLayer(), []
    layer.begin(block.memory.initial, batch)
    layer.start = torch.zeros(batch, dtype=torch.int64)
    for begin in range(0, tokens, segment):
        part = hidden[:, begin : begin + segment]
        mixed.append(block.mix(part, torch.arange(begin, begin + part.shape[1])[None], None, layer))
        layer.finish(part.shape[1])
        if layer.seen % segment == 0:
            layer.end_segment(None)
    for row in range(batch):
        slow = SlowMix(block, window=5)
        close(torch.cat(mixed, 1)[row], torch.stack([slow(one) for one in hidden[row]]))


@every_variant
@examples(max_examples=4)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_pieces_are_the_whole(variant, seed, cuts):
    model = MODELS[variant]
    ids, cache = ids_of(seed, 20), model.new_cache()
    ends = sorted({*cuts, 20} - {0})
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *ends], ends, strict=False)]
    whole = model(ids)
    close(torch.cat(parts, 1), whole.logits)
    for name, tensor in whole.past_key_values.tensors().items():
        close(cache.tensors()[name], tensor)


@every_variant
def test_no_token_sees_a_later_one_and_no_row_another(variant):
    model, ids = MODELS[variant], ids_of(2, 12)
    for token in (0, 3, 5, 8):
        other = ids.clone()
        other[0, token] = (other[0, token] + 1) % 20
        one, two = model(ids).logits, model(other).logits
        assert torch.equal(one[:, :token], two[:, :token])
        assert not torch.equal(one[0, token], two[0, token])
        assert torch.equal(one[1], two[1])
    close(model(ids).logits[:1], model(ids[:1]).logits)


@every_variant
def test_what_was_read_first_is_not_lost(variant):
    """30 tokens later, six windows and seven segments behind, it still changes what is said."""
    model, ids = MODELS[variant], ids_of(0, 30)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 20
    assert not torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1])


# ---- padding ---------------------------------------------------------------------------------------------------------


@every_variant
def test_padding_on_the_left_is_not_there(variant):
    """Rows with their own padding, in pieces, some of which are nothing but padding: every row's own segments."""
    model, tokens, pads = MODELS[variant], 17, (0, 3, 9)
    ids = ids_of(3, tokens, 3)
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    whole, cache, parts = model(ids, attention_mask=mask).logits, model.new_cache(), []
    for begin, end in ((0, 2), (2, 8), (8, tokens)):
        seen = mask[:, begin:end] if end == 8 else mask[:, :end]  # about the new tokens, or about all
        parts.append(model(ids[:, begin:end], attention_mask=seen, past_key_values=cache).logits)
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits[0]
        close(whole[row, pad:], alone)
        close(torch.cat(parts, 1)[row, pad:], alone)


@every_variant
def test_other_padding_is_refused(variant):
    model, ids = MODELS[variant], ids_of(0, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = model.new_cache()
    for wrong in ([1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]):
        with pytest.raises(CacheError, match=r"padding behind a token.*on the left"):
            model(ids, attention_mask=torch.tensor([wrong, [1] * 6]), past_key_values=cache)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(CacheError, match="padding behind a token"):
        model(ids[:, :1], attention_mask=torch.zeros(2, 1), past_key_values=cache)
    with pytest.raises(CacheError, match="other padding"):
        model(ids[:, :1], attention_mask=torch.ones(2, 7), past_key_values=cache)
    with pytest.raises(ModelError, match="about 3 tokens"):
        model(ids[:, :1], attention_mask=torch.ones(2, 3), past_key_values=cache)
    with pytest.raises(CacheError, match="2 rows, and the input has 1"):
        model(ids[:1], past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)


# ---- the cache -------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("tokens", [6, 8], ids=["in a segment", "at its end"])
def test_a_saved_memory_goes_on_to_the_bit(variant, tokens):
    model = MODELS[variant]
    cache, ids = model.new_cache(), ids_of(5, 15)
    model(ids[:, :tokens], past_key_values=cache)
    data = save({name: tensor.contiguous() for name, tensor in cache.tensors().items()})
    again = NeuralCache.of(load(data), 2)
    one, two = (model(ids[:, tokens:], past_key_values=kept).logits for kept in (cache, again))
    assert torch.equal(one, two)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in cache.tensors().items())


@every_variant
def test_generate_is_the_loop(variant):
    """Greedy, with and without a cache of one's own; beams reorder rows; bytes stay as they are."""
    model, slow = MODELS[variant], ids_of(6, 8)
    ids, cache = slow, model.new_cache()
    for _ in range(5):
        slow = torch.cat((slow, model(slow).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), slow)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache), slow)
    size = cache.nbytes()
    model(ids_of(7, 90), past_key_values=cache)
    assert cache.nbytes() == size
    assert cache.get_seq_length() == 12 + 90
    one, two = (model.generate(ids, max_new_tokens=5, num_beams=3, use_cache=uses) for uses in (True, False))
    assert torch.equal(one, two)


def test_bytes_are_those_that_are_worked_out():
    model, rows = Titans(TitansConfig(**SIZES, variant="mac")).eval(), 3
    with torch.no_grad():
        cache = model(ids_of(0, 9, rows)).past_key_values
    numbers, tail, window, start = 2 * (2 * 8 * 8), 2 * 16, 3 * 16, 8
    layer = 4 * (3 * numbers + 4 * tail + 4 * window) + 3 + start
    assert cache.nbytes() == 2 * rows * layer


# ---- types, devices, files -------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_in_single(variant, dtype):
    """Logits are those of single precision, of the same rounded weights, as nearly as those of weights so rounded."""
    half, ids, eps = copy.deepcopy(MODELS[variant]).to(dtype), ids_of(8, 10), torch.finfo(dtype).eps
    out, single, moved = half(ids), copy.deepcopy(half).float(), copy.deepcopy(half).float()
    layer = out.past_key_values.layers[0]
    assert {layer.memory.dtype, layer.momentum.dtype, layer.anchor.dtype} == {torch.float32}
    assert layer.tail_key.dtype == out.logits.dtype == dtype
    torch.manual_seed(0)
    for weight in moved.parameters():  # by half an eps
        weight.mul_(1 + eps / 2 * torch.randn_like(weight))
    wanted = single(ids).logits
    error, movement = (out.logits.float() - wanted).abs(), (moved(ids).logits - wanted).abs()
    assert float(error.median()) <= 4 * float(movement.median())
    assert float(error.max()) <= 6 * float(movement.max())


@every_variant
def test_it_stays_finite_on_4096_tokens(variant):
    """One token again and again, at the largest rate, momentum near 1, and nothing forgotten."""
    model = tiny(variant, num_hidden_layers=1, segment=64, rate=1.5, gradient_limit=10.0).float()
    for block in model.blocks:
        block.memory.gates.bias.copy_(torch.tensor([-20.0, -20.0, 4.6, 4.6, 9.0, 9.0]))
    assert bool(torch.isfinite(model(torch.full((1, 4096), 3), logits_to_keep=1).logits).all())


def test_it_reads_on_an_accelerator():
    """One that only pretends: the processor's numbers to the bit, and nothing mixes devices; rows have padding."""
    ids, mask = ids_of(9, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    for variant in VARIANTS:
        model = copy.deepcopy(MODELS[variant])
        here = model(ids, attention_mask=mask).logits
        with PretendDevices(1):
            model.to("pretend:0")
            there = model(ids.to("pretend:0"), attention_mask=mask.to("pretend:0")).logits.cpu()
            assert torch.equal(there, here)
            model.to("cpu")


def test_compiled_it_answers_the_same_to_the_bit():
    """One layer of the variant that has all the others' parts."""
    model, ids = tiny("mac", num_hidden_layers=1, segment=8), ids_of(7, 6, 1)
    stock = model(ids).logits
    torch.compiler.reset()
    try:
        model.blocks[0].compile(backend="eager")
        assert torch.equal(model(ids).logits, stock)
    finally:
        torch.compiler.reset()


@every_variant
def test_it_is_saved_loaded_and_trains(variant, tmp_path):
    model, tokenizer = tiny(variant, vocab_size=len(zoo_tokenizer())).float(), zoo_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = ids_of(7, 10)
    loaded = load_model(str(tmp_path)).model
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(part, read.state_dict()[name]) for name, part in model.state_dict().items())
    model.train().requires_grad_(True)
    out = model(ids, labels=ids)
    assert out.past_key_values is None
    own = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, own)
    out.loss.backward()
    silent = [name for name, part in model.named_parameters() if part.grad is None or not bool(part.grad.any())]
    assert silent == []


def test_rows_keep_their_beginnings_and_a_refused_pass_leaves_none():
    model, ids = MODELS["mag"], ids_of(3, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    cache = model.new_cache()
    with pytest.raises(IndexError):
        model(ids + 20, attention_mask=mask, past_key_values=cache)
    read = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(read, model(ids, attention_mask=mask).logits)
    starts = cache.starts
    assert starts == (0, 2)
    model(ids[:, :3], past_key_values=cache)
    assert cache.starts is starts  # no pass asks the device again
    cache.reorder_cache(torch.tensor([1, 1]))
    assert [layer.starts for layer in cache.layers] == [(2, 2), (2, 2)]
    with pytest.raises(CacheError, match="behind tokens that were read"):
        cache.note_padding(torch.zeros(2, 1, dtype=torch.bool))
    with pytest.raises(CacheError, match="begin_rows"):
        model.new_cache().note_padding(torch.ones(2, 1, dtype=torch.bool))


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    model, ids = MODELS["mac"], ids_of(0, 3)
    for wrong, message in (
        ({"variant": "mat"}, "lmm"), ({"depth": 5}, "1 to 4"), ({"segment": 0}, "segment"), ({"persistent": -1}, "0 o"),
        ({"hidden_size": 18}, "even size"), ({"memory_heads": 3}, "divided"), ({"rate": 0.0}, "rate"),
        ({"conv": 0}, "conv"), ({"gradient_limit": float("nan")}, "gradient_limit"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            TitansConfig(**{**SIZES, **wrong})
    for cache in (DynamicCache(), NeuralCache(3), MatrixCache(2)):
        with pytest.raises(ModelError, match="new_cache"):
            model(ids, past_key_values=cache)
    with pytest.raises(ModelError, match="numbers"):
        model(ids, past_key_values=tiny("mac", depth=3)(ids).past_key_values)
    for asked, message in (
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, "padding"), ({"output_attentions": True}, "attention weights"),
        ({"input_ids": ids[:, :0]}, "at least one"), ({"labels": ids[:, 1:]}, "labels"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=message):
            model(**{"input_ids": ids, **asked})
    out = model(ids, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 3, 16)] * 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_what_was_read_is_not_taken_back():
    model, ids = MODELS["mag"], ids_of(0, 5)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="a neural memory cannot take tokens back"):
        cache.crop(3)
    cache.layers[1].seen = 4
    with pytest.raises(CacheError, match="cut short"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_manager_that_decides_once_is_refused_with_a_sentence():
    with pytest.raises(ConfigError, match="Titans has a memory of its own"), build("lru").attach(MODELS["lmm"]):
        pass
