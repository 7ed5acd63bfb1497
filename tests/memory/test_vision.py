"""Vision-language models: image tokens are slots like all others, and the vision tower is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from evomem.errors import UnsupportedModelError
from evomem.managers import MemoryManager, build
from evomem.testing.comparing import same_logits

IMAGE = 127
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
SPECS = ("full", "keydiff(budget=10)", "h2o(budget=12, every=8)", "snapkv(budget=12, window=4)")


def frozen(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return make(config).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    """Random; an image of 16 x 16 points becomes 16 tokens."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    return frozen(LlavaForConditionalGeneration, config)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two rows with one image each, the second shorter and left-padded."""
    ids = torch.randint(5, 120, (2, 40))
    ids[0, 6:22], ids[1, 20:36] = IMAGE, IMAGE
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}


def as_text(llava: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of text alone with the same weights, and the same inputs as embeddings, the image's among them."""
    text = frozen(AutoModelForCausalLM.from_config, LlamaConfig(**TEXT))
    text.model.load_state_dict(llava.model.language_model.state_dict())
    text.lm_head.load_state_dict(llava.lm_head.state_dict())
    embeds = text.model.embed_tokens(inputs["input_ids"])
    features = llava.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[inputs["input_ids"] == IMAGE] = torch.cat(list(features))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return text, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "position_ids": positions}


@torch.no_grad()
def answered(model: PreTrainedModel, manager: MemoryManager, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Logits of the real tokens, logits of two further ones, and the slots of every layer after the first pass."""
    further = torch.tensor([[7, 8], [9, 10]])
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(further)), 1)
    positions = (mask.cumsum(1) - 1)[:, -2:]
    with manager.attach(model) as cache:
        read = model(**inputs, past_key_values=cache).logits[inputs["attention_mask"].bool()][None]
        slots = [layer.slots.clone() for layer in cache.layers]
        said = model(further, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return read, said, *slots


@pytest.mark.parametrize("spec", [*SPECS, "expected_attention(budget=12)"])
def test_llava_is_managed_as_the_text_model_in_it(llava, inputs, spec: str) -> None:
    manager = build(spec)
    text, embedded = as_text(llava, inputs)
    got = answered(llava, manager, {**inputs, "position_ids": embedded["position_ids"]})
    wanted = answered(text, manager, embedded)
    same_logits("read", got[0], wanted[0])
    same_logits("further", got[1], wanted[1])
    assert len(got) == 4
    for mine, theirs in zip(got[2:], wanted[2:], strict=True):
        assert torch.equal(mine, theirs)
    if spec != "full":
        image = (inputs["input_ids"] == IMAGE)[:, None].expand(-1, 2, -1)
        kept = [(slots >= 0) & image.gather(2, slots.clamp(min=0)) for slots in got[2:]]
        assert 0 < sum(int(k.sum()) for k in kept) < 2 * 2 * 2 * 16  # of layers, rows, heads, image tokens


@pytest.mark.parametrize("spec", SPECS)
def test_llava_generates(llava, inputs, spec: str) -> None:
    before = llava.generate(**inputs, max_new_tokens=5, do_sample=False)
    with build(spec).attach(llava) as cache:
        got = llava.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, before) == (spec == "full")
    assert torch.equal(llava.generate(**inputs, max_new_tokens=5, do_sample=False), before)  # as it was


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    """Random; rotary positions of three axes; an image of 4 x 4 patches becomes 4 tokens."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124,
    )  # fmt: skip
    return frozen(Qwen2VLForConditionalGeneration, config)


def test_qwen2_vl(qwen) -> None:
    ids = torch.randint(5, 120, (1, 30))
    ids[0, 5:11] = torch.tensor([125, IMAGE, IMAGE, IMAGE, IMAGE, 124])
    inputs = {
        "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip
    stock = qwen(**inputs).logits
    said = qwen.generate(**inputs, max_new_tokens=5, do_sample=False)
    for spec in SPECS:
        with build(spec).attach(qwen) as cache:
            got = qwen.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
            logits = qwen(**inputs, past_key_values=build(spec).new_cache(qwen)).logits
        if "every" not in spec:  # the context is read before the decision
            same_logits(spec, logits, stock)
        assert torch.equal(got, said) == (spec == "full")
        assert spec == "full" or int(cache.slots_held()[0].max()) < 20
    with pytest.raises(UnsupportedModelError, match="three positions"), build("expected_attention").attach(qwen):
        pass
