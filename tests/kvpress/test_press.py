"""EvoMemPress in kvpress's own environment: it keeps what evomem's caches kept, and what kvpress's own presses keep."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import kvpress
import pytest
import torch
from kvpress import AdaKVPress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, pipeline

from evomem.errors import ConfigError
from evomem.managers import FeatureScorer, build
from evomem.plugins.kvpress import EvoMemPress
from evomem.testing.models import tiny_tokenizer

RECORDED = Path(os.environ["EVOMEM_RECORDED"])
CASES = sorted(RECORDED.glob("*/*/case.safetensors"))


@functools.cache
def model_of(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_of(RECORDED / "llama" / "model")


@pytest.fixture(scope="module")
def context() -> torch.Tensor:
    return torch.randint(5, 128, (1, 95), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def pressed(model: PreTrainedModel, press, context: torch.Tensor) -> tuple[list[list[set[int]]], DynamicCache]:
    """Return the tokens kept per layer and head, found by their keys, and the cache."""
    whole, cache = DynamicCache(), DynamicCache()
    model.model(input_ids=context, past_key_values=whole)
    with press(model):
        model.model(input_ids=context, past_key_values=cache)
    kept = []
    for at, (full, layer) in enumerate(zip(whole.layers, cache.layers, strict=True)):
        hidden = getattr(model.model.layers[at].self_attn, "masked_key_indices", None)
        gone = set() if hidden is None else {(int(h), int(t)) for _, h, t in zip(*hidden, strict=True)}
        heads = []
        for head, keys in enumerate(full.keys[0]):
            same = (keys[:, None] == layer.keys[0, head][None]).all(-1).any(-1)
            heads.append({t for t in same.nonzero().flatten().tolist() if (head, t) not in gone})
        kept.append(heads)
    return kept, cache


def shared(kept: list[list[set[int]]], other: list[list[set[int]]]) -> float:
    """Share of the slots that both kept, of those that one of them kept."""
    both = [(a, b) for one, two in zip(kept, other, strict=True) for a, b in zip(one, two, strict=True)]
    return sum(len(a & b) for a, b in both) / sum(len(a | b) for a, b in both)


def test_cases_were_recorded() -> None:
    assert len(CASES) >= 32


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_keeps_what_our_cache_keeps(case: Path) -> None:
    model = model_of(case.parents[1] / "model")
    recorded = load_file(case)
    ids = recorded["ids"]
    press = EvoMemPress(case.parent / "plugin")
    kept, cache = pressed(model, press, ids[:, :-5])
    ours = [
        [{t for t in head.tolist() if t >= 0} for head in recorded[f"kept.{at}"][0]] for at in range(len(cache.layers))
    ]
    print(f"{press.manager.name}: {shared(kept, ours):.4f} of the slots, {len(ours[0][0])} in the first head")
    assert kept == ours
    assert press.manager.name in ("full",) or any(len(head) < 95 for layer in ours for head in layer)
    with torch.no_grad():
        asked = torch.arange(ids.shape[1] - 5, ids.shape[1])[None]
        logits = model(ids[:, -5:], past_key_values=cache, position_ids=asked).logits
    # Where layers keep different numbers nothing is freed, so that the model's one mask fits every layer.
    assert len({layer.keys.shape[2] for layer in cache.layers}) == 1
    # What kvpress hides by keys made for the purpose keeps a trace of attention; what is evicted keeps none.
    trace = 0.01 if cache.layers[0].keys.shape[2] == ids.shape[1] else 1e-4
    assert (logits - recorded["logits"]).std() < trace * recorded["logits"].std()


RATIO = 0.6
SAME = {
    "keydiff": kvpress.KeyDiffPress(RATIO),
    "knorm": kvpress.KnormPress(RATIO),
    "snapkv(window=16)": kvpress.SnapKVPress(RATIO, window_size=16),
    "observed_attention": kvpress.ObservedAttentionPress(RATIO),
    "expected_attention": kvpress.ExpectedAttentionPress(RATIO, epsilon=0.02),
    "streaming_llm": kvpress.StreamingLLMPress(RATIO),
    "adakv(keydiff)": AdaKVPress(kvpress.KeyDiffPress(RATIO)),
}


@pytest.mark.parametrize("spec", SAME)
def test_keeps_what_the_press_of_that_name_keeps(model: PreTrainedModel, context: torch.Tensor, spec: str) -> None:
    theirs = SAME[spec]
    eager = spec == "observed_attention"
    model.set_attn_implementation("eager" if eager else "sdpa")
    try:
        kept, _ = pressed(model, EvoMemPress(build(spec), compression_ratio=RATIO), context)
        assert kept == pressed(model, theirs, context)[0]
    finally:
        model.set_attn_implementation("sdpa")


def test_scores_serve_other_presses(model: PreTrainedModel, context: torch.Tensor) -> None:
    ours = AdaKVPress(EvoMemPress(build("keydiff"), compression_ratio=RATIO))
    assert pressed(model, ours, context)[0] == pressed(model, SAME["adakv(keydiff)"], context)[0]
    ours = AdaKVPress(EvoMemPress(build("keydiff", budget=0.4)))
    assert ours.compression_ratio == pytest.approx(0.6)
    ours.compression_ratio = RATIO
    assert pressed(model, ours, context)[0] == pressed(model, SAME["adakv(keydiff)"], context)[0]


def test_a_ratio_of_nothing_keeps_everything(model: PreTrainedModel, context: torch.Tensor) -> None:
    kept, _ = pressed(model, EvoMemPress(build("keydiff", budget=5), compression_ratio=0.0), context)
    assert all(len(head) == 95 for layer in kept for head in layer)


def test_pipeline_answers(model: PreTrainedModel) -> None:
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tiny_tokenizer())
    said = [
        pipe("the grass is green the sky is blue " * 12, question="the sun is", press=press, max_new_tokens=8)["answer"]
        for press in (EvoMemPress(build("keydiff"), compression_ratio=RATIO), kvpress.KeyDiffPress(RATIO))
    ]
    assert said[0] == said[1] != ""


def test_what_kvpress_cannot_do_is_refused(model: PreTrainedModel, context: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="every=None"):
        EvoMemPress(build("namm"))
    with pytest.raises(ConfigError, match="share"):
        EvoMemPress(build("keydiff"), compression_ratio=1.0)
    with pytest.raises(ConfigError, match="no share of a context"):
        _ = EvoMemPress(build("keydiff", budget=9)).compression_ratio

    class Fading(FeatureScorer):
        def decay(self, view):
            return -view.age.float()

    with pytest.raises(ConfigError, match="decay"):
        pressed(model, EvoMemPress(Fading(budget=9)), context)
    inner = EvoMemPress(build("keydiff"), compression_ratio=RATIO)
    with pytest.raises(ConfigError, match="pieces"):
        pressed(model, kvpress.BlockPress(inner, block_size=16), context)
    padding = torch.ones_like(context)
    padding[:, :3] = 0
    with pytest.raises(ConfigError, match="padded"), EvoMemPress(build("keydiff", budget=9))(model):
        model(context, attention_mask=padding)
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ConfigError, match="sdpa"):
            pressed(model, EvoMemPress(build("adakv(keydiff)", budget=9)), context)
    finally:
        model.set_attn_implementation("sdpa")


def test_an_attention_with_a_short_window_is_refused(context: torch.Tensor) -> None:
    from transformers import MistralConfig

    fields = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1).to_dict()
    config = MistralConfig(**{k: fields[k] for k in ("vocab_size", "hidden_size", "intermediate_size")})
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    config.head_dim, config.sliding_window = 16, 20
    windowed = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="window"), EvoMemPress(build("keydiff", budget=9))(windowed):
        windowed(context)
