"""What users change in a model (its attention, mask, mode) is managed to the stock numbers, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from evomem.errors import CacheError, UnsupportedModelError
from evomem.managers import build
from evomem.testing.models import tiny

TOKENS = torch.arange(5, 17)[None]
FULL = build("full")


@pytest.fixture
def model():
    return tiny("llama", layers=3)


def colder(module, query, key, value, mask, scaling=None, **kwargs):
    return modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling=3 * scaling, **kwargs)


def narrower(*arguments, **kwargs):
    return sdpa_mask(*arguments, **kwargs)


def refused(model, words):
    with pytest.raises(UnsupportedModelError, match=words), FULL.attach(model):
        pytest.fail("attached")


def test_an_attention_or_a_mask_of_ones_own_is_refused(model, monkeypatch):
    attention, mask = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    monkeypatch.setitem(attention, "mine", colder)
    monkeypatch.setitem(mask, "mine", eager_mask)
    model.set_attn_implementation("mine")
    refused(model, r"runs attention 'mine' by a function .*test_own_attention\.colder.*set_attn_implementation")
    monkeypatch.setitem(attention, "mine", attention["sdpa"])
    monkeypatch.setitem(mask, "mine", narrower)
    refused(model, r"runs mask 'mine'")
    model.set_attn_implementation("sdpa")
    with FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", colder)
    refused(model, r"runs attention 'sdpa'")


def test_a_patched_eager_attention_is_refused(model, monkeypatch):
    model.set_attn_implementation("eager")
    with FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", colder)
    refused(model, "runs eager attention")


@pytest.mark.parametrize("first", [[1, 11], [1, 1, 1, 9], [3, 9], [11, 1]])
def test_packed_texts_of_one_token_are_no_padding(model, first):
    mask = torch.zeros(12, 12, dtype=torch.bool)
    begin = 0
    for length in first:
        mask[begin : begin + length, begin : begin + length] = True
        begin += length
    mask = mask.tril()[None, None]
    after = torch.ones(1, 1, 1, 13, dtype=torch.bool)
    known = DynamicCache()
    right = [model(TOKENS, attention_mask=mask, past_key_values=known).logits]
    right.append(model(TOKENS[:, :1], attention_mask=after, past_key_values=known).logits)
    with FULL.attach(model) as cache:
        found = [model(TOKENS, attention_mask=mask, past_key_values=cache).logits]
        found.append(model(TOKENS[:, :1], attention_mask=after, past_key_values=cache).logits)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_second_attention_to_other_keys_is_refused(model, monkeypatch):
    def twice(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        found = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)[0]
        if self.layer_idx:
            found = found - attend(self, query, key * 0.5, value, attention_mask, scaling=self.scaling, **kwargs)[0]
        return self.o_proj(found.reshape(*hidden_states.shape[:-1], -1)), None

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", twice)
    with FULL.attach(model) as cache, pytest.raises(UnsupportedModelError, match="attends a second time in layer 1"):
        model(TOKENS, past_key_values=cache)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 12, dtype=torch.long), torch.tensor([[0, 0, 0, 1] + [1] * 8])])
def test_padding_that_is_shown_later_is_refused(model, mask):
    hidden = torch.tensor([[0] * 4 + [1] * 5])
    with FULL.attach(model) as cache:
        model(TOKENS[:, :9], attention_mask=hidden, past_key_values=cache)
        with pytest.raises(CacheError, match="padding has no slots"):
            model(TOKENS[:, 9:], attention_mask=mask, past_key_values=cache, position_ids=torch.arange(5, 8)[None])


def test_a_model_that_is_copied_inside_a_block_is_whole(model):
    right = model(TOKENS).logits
    with FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)
        other = copy.deepcopy(model)
    assert torch.equal(model(TOKENS).logits, right)
    torch.testing.assert_close(other(TOKENS).logits, right, atol=1e-5, rtol=0)
    with FULL.attach(other) as cache:
        managed = other(TOKENS, past_key_values=cache).logits
        stock = other(TOKENS, use_cache=False).logits
    for found in (managed, stock):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=0)
    assert other.config._attn_implementation == "sdpa"


def test_dropout_is_not_left_out_in_silence():
    model = tiny("llama", attention_dropout=0.5)
    with FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)
    model.train()
    with pytest.raises(CacheError, match=r"attention dropout of 0\.5.*model\.eval"), FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)


def test_weights_that_are_asked_for_are_not_left_out_in_silence(model):
    model.set_attn_implementation("eager")
    with FULL.attach(model) as cache:
        model(TOKENS, past_key_values=cache)
        with pytest.raises(CacheError, match="output_attentions"):
            model(TOKENS, past_key_values=FULL.new_cache(model), output_attentions=True)
        assert len(model(TOKENS, use_cache=False, output_attentions=True).attentions) == 3


def test_attention_is_known_by_what_it_inherits_from(model):
    class Scaled(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            output, weights = super().forward(hidden_states, **kwargs)
            return 2 * output, weights

    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    right = model(TOKENS, use_cache=False).logits
    with FULL.attach(model) as cache:
        torch.testing.assert_close(model(TOKENS, past_key_values=cache).logits, right, atol=1e-5, rtol=0)


def test_a_mask_of_whole_numbers_is_refused(model):
    mask = torch.ones(1, 1, 12, 12, dtype=torch.long).tril()
    with pytest.raises(CacheError, match="type int64: a mask of four dimensions is bool"), FULL.attach(model) as cache:
        model(TOKENS, attention_mask=mask, past_key_values=cache)
