"""Attaching leaves no trace; misuse and unmanageable families give errors that say what to do."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    T5Config,
)

from evomem.errors import CacheError, UnsupportedModelError
from evomem.managers import Full, KNorm, StreamingLLM, build
from evomem.memory import SlotCache, attached, check_supported
from evomem.memory.kv.attention import IMPLEMENTATION
from evomem.testing.comparing import random_rows, read, same_logits
from evomem.testing.conformance import check_evicted_is_hidden, check_keep_everything, check_row_alone
from evomem.testing.models import FAMILIES, tiny, tiny_unsupported
from evomem.testing.reference import Batch


def is_attached(model) -> bool:
    return model.config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION


def state(model) -> tuple:
    """Everything about a model that attaching could touch."""
    modules = [
        (
            name,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            sorted(k for k in vars(m) if k != "training"),
            m.forward.__func__,
        )
        for name, m in model.named_modules()
    ]
    return modules, {k: copy.deepcopy(v) for k, v in vars(model.config).items()}, model.config._attn_implementation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detaching_restores_exactly_also_after_an_error(family: str, implementation: str) -> None:
    model = tiny(family, layers=2)
    model.set_attn_implementation(implementation)
    batch = Batch.of(random_rows(model, [9, 6], 0))
    before, logits = state(model), read(model, None, batch)
    with KNorm(budget=4).attach(model) as cache:
        assert is_attached(model)
        read(model, cache, batch)
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), KNorm(budget=4).attach(model):
        1 / 0  # noqa: B018
    assert state(model) == before
    assert torch.equal(read(model, None, batch), logits)


def test_nested_blocks_and_two_managers_on_one_model() -> None:
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [30], 0))
    alone = []
    for manager in (KNorm(budget=6), StreamingLLM(budget=6, every=5)):
        with manager.attach(model) as cache:
            alone.append(read(model, cache, batch, [20, 10]))
    with KNorm(budget=6).attach(model) as outer:
        first = read(model, outer, batch, [20])
        with StreamingLLM(budget=6, every=5).attach(model) as inner:
            part = read(model, inner, batch, [20])
            last = read(model, outer, batch, at=20)  # interleaved with the inner sequence
            assert torch.equal(torch.cat((part, read(model, inner, batch, at=20)), 1), alone[1])
        assert is_attached(model)
        assert torch.equal(torch.cat((first, last), 1), alone[0])
        fresh = SlotCache.for_model(model, KNorm(budget=6))
        assert torch.equal(read(model, fresh, batch, [20, 10]), alone[0])
    assert not is_attached(model)


@pytest.mark.parametrize("share", [False, True])
def test_two_models_at_once_also_when_they_share_a_configuration(share: bool) -> None:
    one = tiny("llama", layers=2)
    other = type(one)(one.config) if share else tiny("qwen2", layers=2)
    other = other.requires_grad_(False).train(False)
    batch = Batch.of(random_rows(one, [20], 0))
    before = [model.config._attn_implementation for model in (one, other)]
    first, second = attached(one), attached(other)
    first.__enter__()
    caches = [SlotCache.for_model(one, Full())]
    stock = read(other, None, batch)  # without a slot cache: as ever
    second.__enter__()
    caches.append(SlotCache.for_model(other, Full()))
    got = [read(model, cache, batch) for model, cache in zip((one, other), caches, strict=True)]
    first.__exit__(None, None, None)
    same_logits("the other stays attached", read(other, SlotCache.for_model(other, Full()), batch), got[1])
    second.__exit__(None, None, None)
    assert [model.config._attn_implementation for model in (one, other)] == before
    same_logits("stock", stock, read(other, None, batch))
    same_logits("managed", got[1], stock)


def test_threads_with_their_own_caches_do_not_meet() -> None:
    model = tiny("llama", layers=2)
    managers = [KNorm(budget=5), build("h2o(budget=6, every=7)"), Full(), build("snapkv(window=4, budget=8)")]
    batches = [Batch.of(random_rows(model, [30, 21], seed)) for seed in range(4)]
    pieces = [10, 5, 1, 1, 13]
    wanted = []
    for manager, batch in zip(managers, batches, strict=True):
        with manager.attach(model) as cache:
            wanted.append(read(model, cache, batch, pieces))
    got: dict[int, list[torch.Tensor]] = {at: [] for at in range(4)}

    def work(at: int) -> None:
        for _ in range(5):
            with managers[at].attach(model) as cache:
                got[at].append(read(model, cache, batches[at], pieces))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(4):
        assert len(got[at]) == 5
        for logits in got[at]:
            same_logits(f"thread {at}", logits, wanted[at], batches[at].real)
    assert not is_attached(model)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_cache_used_while_not_attached() -> None:
    model = tiny("llama", layers=1)
    with KNorm(budget=4).attach(model) as cache:
        pass
    with pytest.raises(CacheError, match="attach"):
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)


def test_masks_that_cannot_be_meant() -> None:
    model = tiny("llama", layers=1)
    ids = torch.ones(1, 4, dtype=torch.long)
    with Full().attach(model) as cache:
        for shape, message in (((1, 1, 4, 5), "covers 5 tokens"), ((1, 1, 3, 4), "4 new tokens")):
            with pytest.raises(CacheError, match=message):
                model(ids, attention_mask=torch.zeros(shape), past_key_values=cache)
            cache.reset()
        with pytest.raises(UnsupportedModelError, match="every query head"):
            model(ids, attention_mask=torch.zeros(1, 4, 4, 4), past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="covers 4 tokens"):
            model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]), past_key_values=cache)


def test_pass_that_was_cut_short_is_noticed() -> None:
    model = tiny("llama", layers=2)
    batch = Batch.of(random_rows(model, [9], 0))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with Full().attach(model) as cache:
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, batch)
        handle.remove()
        with pytest.raises(CacheError, match="cut short"):
            read(model, cache, batch)
        cache.reset()
        assert torch.isfinite(read(model, cache, batch)).all()


def test_wrong_decisions_are_refused() -> None:
    model = tiny("llama", layers=1)

    class Odd(KNorm):
        def decide(self, view):
            decision = super().decide(view)
            return type(decision)(decision.keep[..., 1:])

    with Odd(budget=2).attach(model) as cache, pytest.raises(CacheError, match="keep-mask of shape"):
        read(model, cache, Batch.of(random_rows(model, [9], 0)))
    with Full().attach(model) as cache, pytest.raises(CacheError, match="nothing has been read"):
        cache.decide()


# ---- families --------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def unmanageable() -> list:
    make = AutoModelForCausalLM.from_config
    mixture = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 32, "head_dim": 8}
    return [
        tiny_unsupported(),
        make(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        AutoModelForSeq2SeqLM.from_config(
            T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        make(GptOssConfig(**SMALL, **mixture, num_key_value_heads=2)),
        make(BartConfig(vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4)),
        make(BertConfig(**SMALL, intermediate_size=32)),
    ]


def test_families_that_cannot_be_managed_are_refused_before_anything_is_changed() -> None:
    for model in unmanageable():
        before = model.config._attn_implementation
        with pytest.raises(UnsupportedModelError, match=type(model).__name__) as caught:
            KNorm(budget=4).attach(model).__enter__()
        assert "evomem" in str(caught.value)
        assert model.config._attn_implementation == before


def test_softcap() -> None:
    """Gemma 2 squashes its logits and alternates full and sliding layers."""
    config = Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=48, sliding_window=9, attn_logit_softcapping=2.0,
        initializer_range=0.3, query_pre_attn_scalar=8, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).train(False)
    model.set_attn_implementation("eager")
    assert check_supported(model) == 2
    for spec in ("knorm(budget=10)", "h2o(budget=12, every=11)"):
        check_keep_everything(build(spec), model)
        check_evicted_is_hidden(build(spec), model)
        check_row_alone(build(spec), model)
