"""The transformer with feedback memory: against plain loops, in pieces, with padding, saved, and generating."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, DynamicCache

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.memory.explicit.feedback import FeedbackCache
from evomem.models.architectures.fam import Fam, FamConfig
from evomem.models.loading import load as load_model
from experiments.zoo.data import zoo_tokenizer
from tests.support.slow_fam import slow_fam

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "block": 4, "segments": 1,
    "feedback": 3, "initializer_range": 0.4,
}  # fmt: skip


def tiny_fam(*, seed=0, **changes):
    """A random model in fp64."""
    torch.manual_seed(seed)
    return Fam(FamConfig(**{**SIZES, **changes})).eval().double().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny_fam()


def ids_of(seed, tokens, batch=2):
    return torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "changes", [{}, {"segments": 2}, {"segments": 0, "feedback": 1}, {"feedback": 6}, {"feedback": 0}]
)
def test_logits_and_feedback_are_those_of_plain_loops(changes):
    """Without feedback, the loops are those of block sliding-window attention."""
    model, ids = tiny_fam(**changes), ids_of(1, 14)
    out = model(ids)
    for row in range(2):
        logits, ends = slow_fam(model, ids[row].tolist())
        close(out.logits[row], logits)
        for layer, feedback in zip(out.past_key_values.layers, ends, strict=True):
            if feedback:
                close(layer.feedback[row], torch.stack(feedback))
            else:
                assert layer.feedback is None


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_pieces_are_the_whole(model, seed, cuts):
    ids, cache = ids_of(seed, 20), model.new_cache()
    ends = sorted({*cuts, 20} - {0})
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *ends], ends, strict=False)]
    whole = model(ids)
    close(torch.cat(parts, 1), whole.logits)
    for name, tensor in whole.past_key_values.tensors().items():
        close(cache.tensors()[name], tensor)


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), token=st.integers(0, 11))
def test_no_token_sees_a_later_one(model, seed, token):
    ids = ids_of(seed, 12)
    other = ids.clone()
    other[:, token] = (other[:, token] + 1) % 20
    one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :token], two[:, :token])
    assert not torch.equal(one[:, token], two[:, token])


def test_feedback_reaches_as_far_as_the_text_and_adds_its_embeddings_only():
    """Two layers of blocks of 4 with one segment see 3 blocks back at most: what came before is in F, or nowhere."""
    ids = ids_of(0, 40)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 20
    counts = []
    for slots, reaches in ((0, False), (3, True)):
        model = tiny_fam(feedback=slots)
        assert torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1]) != reaches
        counts.append(model.num_parameters())
    assert counts[1] - counts[0] == 3 * 16


def test_resident_bytes_are_flat_and_exact():
    model, cache, sizes = tiny_fam(), None, []
    cache = model.new_cache()
    for _ in range(128):
        model(ids_of(2, 4), past_key_values=cache)
        sizes.append(cache.nbytes())
    # rows * (7 tokens of the window's keys, values and mark; F; where the row begins), two layers
    assert sizes[15] == sizes[-1] == 2 * 2 * (7 * (2 * 16 * 8 + 1) + 3 * 16 * 8 + 8)
    assert torch.isfinite(cache.layers[1].feedback).all()


@pytest.mark.parametrize("pads", [(3, 3), (1, 6), (0, 9)])
def test_padding_on_the_left_is_not_there(model, pads):
    """Rows whose blocks end at different tokens included, and padding that comes in several pieces."""
    ids, most = ids_of(3, 13), max(pads)
    rows = [torch.cat((ids_of(4, pad, 1)[0], row[: 13 + most - pad])) for pad, row in zip(pads, ids, strict=True)]
    rows = [row[: 13 + min(pads)] for row in rows]
    padded, mask = torch.stack(rows), torch.ones(2, len(rows[0]), dtype=torch.int64)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    for cuts in ((), (2, 5), (4, 7, 8)):
        cache, parts = model.new_cache(), []
        for begin, end in zip((0, *cuts), (*cuts, padded.shape[1]), strict=True):
            parts.append(model(padded[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        logits = torch.cat(parts, 1)
        for row, pad in enumerate(pads):
            alone = model(padded[row : row + 1, pad:])
            close(logits[row, pad:], alone.logits[0])
            for one, two in zip(cache.layers, alone.past_key_values.layers, strict=True):
                close(one.feedback[row], two.feedback[0])


def test_rows_have_memories_of_their_own_and_are_selected_and_repeated(model):
    ids, cache = ids_of(5, 18, 3), model.new_cache()
    model(ids[:, :10], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    order = [2, 2, 0, 0]
    got = model(ids[order, 10:], past_key_values=cache).logits
    for row, number in enumerate(order):
        close(got[row], model(ids[number : number + 1]).logits[0, 10:])


@pytest.mark.parametrize("slots", [0, 3])
def test_a_saved_memory_goes_on_to_the_bit(slots):
    model = tiny_fam(feedback=slots)
    cache, ids = model.new_cache(), ids_of(6, 19)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
    data = save({name: tensor.contiguous() for name, tensor in cache.tensors().items()})
    again, cloned = FeedbackCache.of(load(data), 2), copy.deepcopy(cache)
    logits = [model(ids[:, 10:], past_key_values=one).logits for one in (cache, again, cloned)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length(), cache.starts) == (0, 0, ())
    close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_generate_is_the_loop(model):
    """Greedy, with and without a cache of one's own; beams reorder rows."""
    ids = ids_of(7, 7)
    slow = ids
    for _ in range(6):
        slow = torch.cat((slow, model(slow).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), slow)
    cache = model.new_cache()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache), slow)
    one, two = (model.generate(ids, max_new_tokens=6, num_beams=3, use_cache=uses) for uses in (True, False))
    assert torch.equal(one, two)


def test_it_is_saved_loaded_and_trains(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids = ids_of(8, 14)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.train()
    out = again(ids)
    assert out.past_key_values is None
    out.logits[:, 8:].square().mean().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in again.parameters())


def test_a_folder_is_loaded_as_every_model_is(tmp_path):
    tokenizer = zoo_tokenizer()
    model = tiny_fam(vocab_size=len(tokenizer)).float()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path)).model(ids_of(9, 7)).logits, model(ids_of(9, 7)).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_single_precision_up_to_rounding(dtype):
    """Of the same rounded weights, and no farther off than weights that move by half an eps."""
    half, eps, ids = tiny_fam(seed=3).to(dtype), torch.finfo(dtype).eps, ids_of(10, 22)
    single = copy.deepcopy(half).float()
    moved = copy.deepcopy(single)
    draw = torch.Generator().manual_seed(0)
    for weight in moved.parameters():
        weight.mul_(1 + eps / 2 * torch.randn(weight.shape, generator=draw))
    wanted, other, got = (one(ids) for one in (single, moved, half))
    assert got.past_key_values.layers[0].feedback.dtype == torch.float32
    assert got.logits.dtype == dtype
    error, movement = (got.logits.float() - wanted.logits).abs(), (other.logits - wanted.logits).abs()
    assert float(error.max()) <= 3 * float(movement.max())
    for project in (block.attention.q_proj for block in half.blocks):
        project.weight.mul_(100)  # products of queries and keys that fp16 has no numbers for
    assert torch.isfinite(half(ids).logits).all()


def test_compiled_it_answers_the_same_to_the_bit():
    model, ids = tiny_fam(num_hidden_layers=1), ids_of(11, 6, 1)
    stock = model(ids).logits
    torch.compiler.reset()
    try:
        model.blocks[0].compile(backend="eager")
        assert torch.equal(model(ids).logits, stock)
    finally:
        torch.compiler.reset()


def test_what_cannot_be_is_refused(model):
    for wrong, message in (
        ({"hidden_size": 18}, "even size"), ({"block": 0}, "block"), ({"segments": -1}, "segments"),
        ({"feedback": -1}, "feedback"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            FamConfig(**{**SIZES, **wrong})
    ids = ids_of(0, 6)
    with pytest.raises(ModelError, match="new_cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ModelError, match="rows and at least"):
        model(ids, attention_mask=torch.ones(3, 6))
    for spots in ([2], [4, 5]):
        mask = torch.ones_like(ids)
        mask[0, spots] = 0
        with pytest.raises(CacheError, match="on the left"):
            model(ids, attention_mask=mask)
    cache = model(ids).past_key_values
    with pytest.raises(CacheError, match="rows, and the input has 1"):
        model(ids[:1], past_key_values=cache)
    late = torch.ones_like(ids)
    late[0, :2] = 0
    with pytest.raises(CacheError, match="behind tokens that were read"):
        model(ids, attention_mask=late, past_key_values=cache)
    with pytest.raises(CacheError, match="cannot take tokens back"):
        cache.layers[0].crop(-1)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("0.window_real", lambda part: part[:, 1:], "instead of"),
        ("1.feedback", lambda part: part * torch.nan, "number"),
        ("0.start", lambda part: part + 99, "no index"), ("0.window_keys", lambda part: part[0], "axes"),
        ("0.start", None, "missing"),
    ],
)  # fmt: skip
def test_a_damaged_memory_is_refused(model, name, harm, message):
    tensors = model(ids_of(0, 9)).past_key_values.tensors()
    if harm is None:
        del tensors[name]
    else:
        tensors[name] = harm(tensors[name])
    with pytest.raises(CacheError, match=message):
        FeedbackCache.of(tensors, 2)
