"""Feedback memory around a frozen decoder: against plain loops, and against the decoder itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from evomem.errors import CacheError, ConfigError, EvomemError, ModelError, UnsupportedModelError
from evomem.managers import build
from evomem.memory.explicit.feedback import FeedbackCache
from evomem.models.architectures.fam_around import FamAround
from tests.support.slow_fam_around import slow_fam_around

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "initializer_range": 0.4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
KV = {"num_key_value_heads": 2, "head_dim": 4}


def decoder(family="llama", **changes):
    """A random decoder in fp64."""
    torch.manual_seed(0)
    if family == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "rotary_pct": 0.5, **changes}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **KV, **changes}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **KV, **changes}))
    return model.eval().double()


def around(model, **sizes):
    torch.manual_seed(1)
    made = FamAround(model, **{"block": 4, "segments": 1, "feedback": 3, **sizes})
    if made.summary is not None:  # what a token embedding is not: any vectors
        torch.nn.init.normal_(made.summary.weight)
    return made.eval()


@pytest.fixture(scope="module")
def model():
    return around(decoder())


def ids_of(seed, tokens, batch=2):
    return torch.randint(2, 20, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(one, other):
    torch.testing.assert_close(one.to(other.dtype), other, rtol=1e-5, atol=1e-5)


every_family = pytest.mark.parametrize("family", ["llama", "qwen3", "neox"])


@pytest.mark.parametrize("sizes", [{}, {"segments": 2, "feedback": 1}, {"segments": 0, "feedback": 6}])
def test_logits_and_feedback_are_those_of_plain_loops(sizes):
    stock = decoder()
    model, ids = around(stock, **sizes), ids_of(1, 14)
    with torch.no_grad():
        out = model(ids)
        for row in range(2):
            logits, ends = slow_fam_around(
                stock, model.summary.weight.double(), ids[row].tolist(), model.config.block, model.config.segments
            )
            close(out.logits[row], logits)
            for layer, feedback in zip(out.past_key_values.layers, ends, strict=True):
                close(layer.feedback[row], torch.stack(feedback))


@every_family
@pytest.mark.parametrize("segments", [0, 2])
@torch.no_grad()
def test_without_feedback_it_is_the_decoder_under_a_mask_of_blocks(family, segments):
    stock, ids, block = decoder(family), ids_of(2, 19), 4
    at = torch.arange(19)
    sees = (at[:, None] >= at) & (at[:, None] // block - at // block <= segments)
    mask = torch.zeros(1, 1, 19, 19, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    wanted = stock(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(around(stock, feedback=0, segments=segments)(ids).logits, wanted)


@every_family
@torch.no_grad()
def test_within_its_field_it_is_the_decoder(family):
    stock, ids = decoder(family), ids_of(3, 8)
    for sizes in ({"block": 8}, {"block": 4}):  # one block, and two of which one is a segment
        torch.testing.assert_close(around(stock, feedback=0, **sizes)(ids).logits, stock(ids).logits)


@every_family
@torch.no_grad()
def test_feedback_reaches_as_far_as_the_text_and_adds_its_embeddings_only(family):
    stock, ids = decoder(family), ids_of(0, 40)
    other = ids.clone()
    other[:, 0] = (other[:, 0] - 1) % 18 + 2
    for slots, reaches in ((0, False), (3, True)):
        model = around(stock, feedback=slots)
        assert torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1]) != reaches
        assert sum(p.numel() for p in model.parameters()) == slots * 16
        assert set(model.state_dict()) == ({"summary.weight"} if slots else set())


@examples(max_examples=6)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 20), max_size=4))
@torch.no_grad()
def test_pieces_are_the_whole(model, seed, cuts):
    ids, cache = ids_of(seed, 20), model.new_cache()
    ends = sorted({*cuts, 20} - {0})
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *ends], ends, strict=False)]
    whole = model(ids)
    close(torch.cat(parts, 1), whole.logits)
    for name, tensor in whole.past_key_values.tensors().items():
        close(cache.tensors()[name], tensor)


@torch.no_grad()
def test_padding_on_the_left_is_not_there(model):
    ids = ids_of(4, 15, 1)
    padded, mask = torch.cat((torch.full((1, 3), 5), ids), 1), torch.ones(1, 18, dtype=torch.int64)
    mask[:, :3] = 0
    both = torch.cat((padded, ids_of(5, 18, 1)))
    got = model(both, attention_mask=torch.cat((mask, torch.ones_like(mask)))).logits
    close(got[0, 3:], model(ids).logits[0])
    close(got[1], model(both[1:]).logits[0])


@torch.no_grad()
def test_resident_bytes_are_flat(model):
    cache, sizes = model.new_cache(), []
    for _ in range(40):
        model(ids_of(2, 4), past_key_values=cache)
        sizes.append(cache.nbytes())
    # two layers, two rows: keys and values of 7 tokens in 2 heads of 4, their mark; F; where the row begins
    assert sizes[3] == sizes[-1] == 2 * 2 * (7 * (2 * 2 * 4 * 8 + 1) + 3 * 16 * 8 + 8)


def test_gradients_reach_the_embeddings_alone_and_are_those_of_differences():
    stock = decoder()
    model, ids = around(stock), ids_of(6, 14)
    model(ids, labels=ids).loss.backward()
    gradient = model.summary.weight.grad
    assert all(p.grad is None and p.requires_grad for p in stock.parameters())
    step = torch.zeros_like(model.summary.weight)
    step[1, 2] = 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            model.summary.weight += sign * step
            losses.append(float(model(ids, labels=ids).loss))
            model.summary.weight -= sign * step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradient[1, 2]), rel=0.02)


@torch.no_grad()
def test_a_population_of_embeddings_is_a_batch(model):
    ids, several = ids_of(7, 14, 1), torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(3))
    got = model(ids.expand(3, -1), past_key_values=model.new_cache(several)).logits
    for row, one in enumerate(several):
        other = copy.deepcopy(model)
        other.summary.weight.copy_(one)
        close(got[row], other(ids).logits[0])
    with pytest.raises(CacheError, match=r"2 rows .* given for 3"):
        model(ids.expand(2, -1), past_key_values=model.new_cache(several))
    with pytest.raises(ModelError, match=r"give \(rows, slots, hidden_size\)"):
        model.new_cache(several[0])


@torch.no_grad()
def test_the_decoder_is_left_as_it_was():
    stock, ids = decoder(), ids_of(8, 12)
    before = stock(ids).logits
    model = around(stock)
    model(ids)
    assert torch.equal(stock(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stock.modules())
    shared = {p.data_ptr() for p in stock.parameters()}
    assert {p.data_ptr() for p in model._decoder.model.parameters()} == shared  # no second copy of the weights
    model.float()
    assert [one(ids).logits.dtype for one in (model, stock)] == [torch.float32, torch.float64]


@torch.no_grad()
def test_it_generates_and_returns_hidden_states(model):
    ids = ids_of(9, 10)
    made = model.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    for end in range(10, 16):
        assert torch.equal(model(made[:, :end]).logits[:, -1].argmax(-1), made[:, end])
    out = model(ids, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 10, 16)] * 3
    close(model.lm_head(out.hidden_states[-1]), out.logits)


@torch.no_grad()
def test_a_saved_memory_goes_on(model):
    ids, cache = ids_of(10, 19), model.new_cache()
    model(ids[:, :10], past_key_values=cache)
    again = FeedbackCache.of({k: v.clone() for k, v in cache.tensors().items()}, 2)
    assert torch.equal(
        model(ids[:, 10:], past_key_values=again).logits, model(ids[:, 10:], past_key_values=cache).logits
    )
    with pytest.raises(CacheError, match="read with segments 1"):
        around(decoder(), segments=2)(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("features", [[], ["change", "agreement", "updates"]])  # their weights are 0
def test_a_write_gate_is_that_of_plain_loops(features):
    stock = decoder()
    model, ids = around(stock), ids_of(11, 18)
    with build("write_gate", every=4, features=features, bias=0.7).attach(model) as cache:
        got = model(ids, past_key_values=cache).logits
    gate = float(torch.sigmoid(torch.tensor(0.7)))
    for row in range(2):
        logits, ends = slow_fam_around(
            stock, model.summary.weight.double(), ids[row].tolist(), 4, 1, [lambda *_: gate] * 2
        )
        close(got[row], logits)
        for layer, feedback in zip(cache.layers, ends, strict=True):
            close(layer.feedback[row], torch.stack(feedback))


@torch.no_grad()
def test_half_precision_is_near(model):
    ids = ids_of(12, 14)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half(ids).logits.softmax(-1) - model(ids).logits.softmax(-1)).abs().mean() < 0.05
    assert half(ids).past_key_values.layers[0].feedback.dtype == torch.float32


@torch.no_grad()
def test_it_reads_on_an_accelerator(devices):
    """Made on the processor and moved, and made of a decoder that is there already; nothing mixes devices."""
    stock, ids = decoder().float(), ids_of(13, 14)
    model = around(stock)
    here = model(ids).logits
    moved = copy.deepcopy(model).to("pretend:0")
    assert moved.device == torch.device("pretend:0")
    assert torch.equal(moved(ids.to("pretend:0")).logits.cpu(), here)
    there = FamAround(stock.to("pretend:1"), block=4, segments=1, feedback=3)
    there.summary.weight.copy_(model.summary.weight)
    assert torch.equal(there(ids.to("pretend:1")).logits.cpu(), here)
    with build("write_gate", every=4, bias=100.0).attach(there) as cache:  # each update is written whole
        close(there(ids.to("pretend:1"), past_key_values=cache).logits.cpu(), here)


REFUSED = {
    "GPT2LMHeadModel has no rotary": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)),
    "Gemma2ForCausalLM scales or norms what attention reads": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **KV)),
    "see 6 tokens, and block and segments make 8": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, **KV, sliding_window=6)
    ),
    r"depend on the text's length \(dynamic\)": lambda: decoder(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_decoders_that_cannot_be_read_so_are_refused(message):
    with pytest.raises(UnsupportedModelError, match=message):
        around(REFUSED[message]())


def test_a_decoder_with_hooks_is_refused():
    stock = decoder()
    stock.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedModelError, match="has forward hooks"):
        around(stock)


def test_what_it_cannot_do_is_refused(model, tmp_path):
    ids = ids_of(0, 10)
    with pytest.raises(ConfigError, match="block is 0"):
        around(decoder(), block=0)
    with pytest.raises(ConfigError, match="every 3 tokens"):
        model.decided_cache(build("write_gate", every=3))
    with pytest.raises(ConfigError, match="does not say who reads"):
        model.decided_cache(build("lru", budget=2, every=4))
    cache = model.decided_cache(build("random", budget=2, every=4))
    with pytest.raises(CacheError, match="evicted slots of a feedback memory around"):
        model(ids, past_key_values=cache)
    for call in (model.save_pretrained, FamAround.from_pretrained):
        with pytest.raises(ModelError, match="around a decoder"):
            call(tmp_path)
    with pytest.raises(EvomemError, match="output_attentions"):
        model(ids, output_attentions=True)
