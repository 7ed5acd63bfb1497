from __future__ import annotations

import math

import pytest
import torch

from evomem.errors import UnknownNameError
from evomem.models import load
from evomem.testing.models import FAMILIES, VOCABULARY, tiny, tiny_tokenizer, tiny_unsupported


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_attend_unevenly_and_are_reproducible(family):
    model = tiny(family, attn_implementation="eager")
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(family).parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(next(model.parameters()), next(tiny(family, seed=1).parameters()))
    assert not model.training
    out = model(torch.randint(4, VOCABULARY, (2, 48)), output_attentions=True)
    weights = torch.stack(out.attentions)[..., -1, :]  # (layers, batch, heads, keys) of the newest query
    assert len(out.attentions) == 3
    entropy = -(weights.clamp(min=1e-12).log() * weights).sum(-1).mean()
    assert entropy < 0.8 * math.log(48)
    assert model.config.max_position_embeddings >= 2048


def test_tiny_models_take_overrides_and_refuse_unknown_families():
    assert tiny("mistral", layers=2, sliding_window=16).config.sliding_window == 16
    assert tiny("llama", layers=2).config.num_hidden_layers == 2
    with pytest.raises(UnknownNameError, match="llama"):
        tiny("lama")


def test_the_unsupported_model_has_no_kv_cache():
    model = tiny_unsupported()
    assert model(torch.randint(4, VOCABULARY, (1, 8))).logits.shape == (1, 8, VOCABULARY)
    assert "past_key_values" not in list(model(torch.randint(4, VOCABULARY, (1, 8))).keys())


def test_the_tiny_tokenizer_is_additive_over_blanks_and_survives_saving(tmp_path):
    tokenizer = tiny_tokenizer()
    first, second = "The special magic number for cat", " is: 1234, w3 unheard."
    ids = tokenizer.encode(first + second)
    assert ids == tokenizer.encode(first) + tokenizer.encode(second)
    assert len(tokenizer) == VOCABULARY
    assert max(tokenizer.get_vocab().values()) == VOCABULARY - 1
    assert ids.count(tokenizer.unk_token_id) == 1
    tokenizer.save_pretrained(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    assert load(str(tmp_path)).tokenizer.encode(first + second) == ids
