"""Masks that a model says only by its mask: with nothing evicted managed attention is the stock model's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PhimoeConfig,
    PhimoeForCausalLM,
    SiglipVisionConfig,
)

from evomem.managers import build
from evomem.memory import Decision, LayerView, SlotCache, attached
from evomem.testing.comparing import kv_heads, same_logits
from evomem.testing.reference import Batch, Tracing, explicit_biases, explicit_logits, explicit_pass

IMAGE = 127
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
Inputs = dict[str, torch.Tensor]


def frozen(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return make(config).requires_grad_(False).eval()


def text_inputs() -> Inputs:
    """Two rows of 40 tokens, the second left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 120, (2, 40), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs() -> Inputs:
    """The same with an image of 16 tokens in each row, at different places."""
    inputs = text_inputs()
    inputs["input_ids"][0, 6:22] = inputs["input_ids"][1, 15:31] = IMAGE
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


@pytest.fixture(scope="module")
def phimoe() -> Any:
    """All layers slide, and no layer says so to the attention function."""
    return frozen(PhimoeForCausalLM, PhimoeConfig(**TEXT, num_local_experts=4, sliding_window=9))


@pytest.fixture(scope="module")
def paligemma() -> Any:
    """The image and the prompt see each other."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=GemmaConfig(**{**TEXT, "num_key_value_heads": 4}, head_dim=16),
        image_token_id=IMAGE, projection_dim=64,
    )  # fmt: skip
    return frozen(PaliGemmaForConditionalGeneration, config)


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """The tokens of an image see each other, in the sliding layer as far as the window reaches."""
    layers = ["sliding_attention", "full_attention"]
    text = Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=12, layer_types=layers)
    vision = SiglipVisionConfig(**VISION)
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, mm_tokens_per_image=16, boi_token_id=125,
        eoi_token_id=126,
    )  # fmt: skip
    return frozen(Gemma3ForConditionalGeneration, config)


@pytest.fixture(scope="module")
def llama() -> Any:
    return frozen(LlamaForCausalLM, LlamaConfig(**TEXT))


@pytest.fixture(scope="module")
def gemma2() -> Any:
    """Squashes its logits, so that the softmax is written out; full attention only."""
    config = Gemma2Config(**TEXT, head_dim=16, attn_logit_softcapping=5.0, layer_types=["full_attention"] * 2)
    config._attn_implementation = "eager"
    return frozen(Gemma2ForCausalLM, config)


def cases(request: pytest.FixtureRequest, name: str) -> tuple[Any, Inputs]:
    model = request.getfixturevalue(name)
    if name == "phimoe":
        return model, text_inputs()
    inputs = image_inputs()
    if name == "paligemma":  # 0 marks what sees each other: the image and half of the text
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs["token_type_ids"][:, 32:] = 1
    return model, inputs


@pytest.mark.parametrize("name", ["phimoe", "paligemma", "gemma3"])
@pytest.mark.parametrize(
    "spec", ["full", "h2o(budget=500)", "snapkv(budget=500, window=6)", "h2o(budget=500, every=7)"]
)
@torch.no_grad()
def test_nothing_evicted_is_the_stock_model(request, name: str, spec: str) -> None:
    """Recording, and cutting inside an image, change nothing; nor does generating after it."""
    model, inputs = cases(request, name)
    real = inputs["attention_mask"].bool()
    stock = model(**inputs).logits
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with build(spec).attach(model) as cache:
        same_logits(name, model(**inputs, past_key_values=cache).logits, stock, real)
        cache.reset()
        got = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, said)


# ---- masks that the user writes --------------------------------------------------------------------------------------


def written_mask(kind: torch.dtype) -> torch.Tensor:
    """(2, 1, 40, 40): two packed texts in the first row; in the second padding, and a hole that nobody looks into."""
    seen = torch.ones(40, 40, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[0, :, 22:, :22] = False
    seen[1, :, :, :9] = seen[1, :, :9] = False
    seen[1, :, 20:, 12:15] = False
    return seen if kind == torch.bool else torch.where(seen, 0.0, torch.finfo(kind).min).to(kind)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("spec", ["full", "h2o(budget=99)", "keydiff(budget=99)"])
@torch.no_grad()
def test_masks_of_four_dimensions(request, name: str, kind: torch.dtype, spec: str) -> None:
    if name == "gemma2" and kind == torch.bool:
        pytest.skip("eager attention adds its mask")
    model, inputs = request.getfixturevalue(name), text_inputs()
    inputs["attention_mask"] = written_mask(kind)
    further = torch.tensor([[5, 6], [7, 8]])
    grown = torch.nn.functional.pad(written_mask(kind)[:, :, -2:], (0, 2), value=True if kind == torch.bool else 0.0)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :9] = False
    stock_cache = DynamicCache(config=model.config)
    stock = model(**inputs, past_key_values=stock_cache).logits
    said = model(further, attention_mask=grown, past_key_values=stock_cache).logits
    with build(spec).attach(model) as cache:
        same_logits(name, model(**inputs, past_key_values=cache).logits, stock, real)
        assert cache.layers[0].start.tolist() == [0, 9]  # the manager's clock leaves padding out
        same_logits(name, model(further, attention_mask=grown, past_key_values=cache).logits, said)


# ---- with eviction: equal to the stock model under the explicit mask that hides the evicted tokens -------------------


def positions(inputs: Inputs) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


SPECS = [
    "knorm(budget=10)",
    "snapkv(budget=10, window=6)",
    "adakv(keydiff, budget=10)",
    "streaming_llm(budget=12, every=7)",
    "h2o(budget=12, every=5)",
    "tova(budget=9, every=3)",
]


@pytest.mark.parametrize("name", ["phimoe", "paligemma", "gemma3"])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_evicted_tokens_are_hidden_and_nothing_else(request, name: str, spec: str) -> None:
    """Image tokens too; decisions fall into the middle of images; then more text is read in two passes."""
    model, inputs = cases(request, name)
    manager = build(spec)
    tracing = Tracing(manager)
    more = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    ids = torch.cat((inputs["input_ids"], more), 1)
    real = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
    batch = Batch(ids, real.bool(), positions({"attention_mask": real}))
    with attached(model):
        cache = SlotCache.for_model(model, tracing)
        outputs = [model(**inputs, position_ids=positions(inputs), past_key_values=cache).logits]
        for at, end in ((40, 43), (43, 44)):
            part = {"attention_mask": real[:, :end], "position_ids": batch.positions[:, at:end]}
            outputs.append(model(ids[:, at:end], **part, past_key_values=cache).logits)
    assert int(cache.slots_held()[0].max()) < 25
    images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "token_type_ids" in images:
        tail = torch.full_like(more, 1 if name == "paligemma" else 0)  # what no image is part of
        images["token_type_ids"] = torch.cat((images["token_type_ids"], tail), 1)
    biases = explicit_biases(tracing.events, batch, 2, kv_heads(model), manager.schedule.every)
    same_logits(name, torch.cat(outputs, 1), explicit_logits(model, batch, biases, **images), batch.real)


@dataclass
class Watching:
    """Keeps everything, and every view that it is shown."""

    observes: frozenset[str] = frozenset({"attention_sum", "window_attention:5"})
    every: int | None = 7
    views: list[LayerView] = field(default_factory=list)

    @property
    def schedule(self) -> Watching:
        return self

    def decide(self, view: LayerView) -> Decision:
        recorded = {name: value.clone() for name, value in view.recorded.items()}
        self.views.append(replace(view, recorded=recorded))
        return Decision(view.valid)


@pytest.mark.parametrize("name", ["phimoe", "paligemma", "gemma3"])
@torch.no_grad()
def test_observations_see_the_same_mask(request, name: str) -> None:
    """A query in an image is counted for the tokens after it in the image, from when they are read."""
    model, inputs = cases(request, name)
    batch = Batch(inputs["input_ids"], inputs["attention_mask"].bool(), positions(inputs))
    images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    watching = Watching()
    with attached(model):
        model(**inputs, past_key_values=SlotCache.for_model(model, watching))
    _, attention, _ = explicit_pass(model, batch, explicit_biases({}, batch, 2, kv_heads(model), 7), **images)
    checked = 0
    for view in watching.views:
        for row in range(2):
            first, seen = int(view.start[row]), view.seen
            if (seen - first) % 7 or seen <= first:
                continue  # another row's turn
            paid = attention[view.layer][row, :, first:seen, first:seen]
            assert view.slots[row, 0, first:].tolist() == list(range(first, seen))
            recorded = {name: value[row, :, first:] for name, value in view.recorded.items()}
            torch.testing.assert_close(recorded["attention_sum"], paid.sum(1), rtol=1e-4, atol=1e-5)
            shares = paid[:, -5:].sum(-1, keepdim=True)  # the rest goes to what comes later, and is not held yet
            if name == "gemma3" and float(shares.min()) < 0.999:
                continue  # the mean over a group of query heads says nothing about each
            last = paid[:, -5:] / shares
            torch.testing.assert_close(recorded["window_attention:5"], last.mean(1), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 5
