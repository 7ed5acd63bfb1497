"""Masks that a model says only by its mask: with nothing evicted managed attention is the stock model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
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
from evomem.testing.comparing import same_logits

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
        vision_config=SiglipVisionConfig(**VISION), text_config=GemmaConfig(**TEXT, head_dim=16),
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
