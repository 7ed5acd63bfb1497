"""What callers ask of models of our own besides logits: loss, hidden states, tuples; and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers.loss.loss_utils import LOSS_MAPPING

from evomem.errors import ModelError
from tests.models.test_decision import tiny_decision
from tests.models.test_fam import tiny_fam
from tests.models.test_memory_models import MODELS, evicting, ids_of

EVERY = MODELS | {"decision": tiny_decision(), "feedback": tiny_fam(vocab_size=30, block=9).float()}
every_model = pytest.mark.parametrize("name", EVERY)
with_memory = pytest.mark.parametrize("name", MODELS)


def layers_of(model):
    """Modules whose outputs are hidden states, and the one that normalises the last of them."""
    if hasattr(model, "decision"):
        return list(model.decision.encoder.h), model.decision.encoder.ln_f
    return list(model.blocks if hasattr(model, "blocks") else model.layers), model.norm


def slow_losses(logits, labels, ignored=-100):
    """Minus the log probability of every label that is not ignored, from the logits one place before it."""
    losses = []
    for row, said in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for place in range(1, len(said)):
            if said[place] != ignored:
                most = max(row[place - 1])
                total = sum(math.exp(value - most) for value in row[place - 1])
                losses.append(most + math.log(total) - row[place - 1][said[place]])
    return losses


@every_model
def test_loss_is_that_of_the_next_token(name):
    model, ids = EVERY[name], ids_of(0, 9)
    assert model.loss_type in LOSS_MAPPING  # else transformers warns, and guesses
    labels = ids.clone()
    labels[0, 3:5] = -100
    plain = model(ids)
    assert plain.loss is None
    losses = slow_losses(plain.logits, labels)
    assert len(losses) == 14
    output = model(input_ids=ids, labels=labels)
    assert torch.equal(output.logits, plain.logits)
    assert float(output.loss) == pytest.approx(sum(losses) / 14, rel=1e-5)
    # As a trainer asks whose step has several batches: the sum over the number of labels in all of them.
    part = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40))
    assert float(part.loss) == pytest.approx(sum(losses) / 40, rel=1e-5)
    sevens = labels.masked_fill(labels == -100, 7)
    losses = slow_losses(plain.logits, sevens, 7)
    other = model(input_ids=ids, labels=sevens, ignore_index=7)
    assert float(other.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_loss_can_be_learned_from():
    model, ids = EVERY["matrix"], ids_of(1, 9)  # the one whose head is not the table of token vectors, too
    weight = model.lm_head.weight
    weight.requires_grad_()
    try:
        output = model(ids, labels=ids)
        (gradient,) = torch.autograd.grad(output.loss, weight)
    finally:
        weight.requires_grad_(False)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    # The loss's gradient by a logit is its probability, less one for the label, over the number of labels.
    wrong = output.logits[:, :-1].softmax(-1).detach()
    wrong.scatter_add_(-1, ids[:, 1:, None], torch.full((2, 8, 1), -1.0))
    wanted = torch.einsum("btv,btd->vd", wrong, hidden[:, :-1]) / 16
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@every_model
@pytest.mark.parametrize("managed", [False, True])
def test_hidden_states_are_what_layers_return(name, managed):
    """Told by hooks; of chunks, which a manager cuts, put together; the last is what logits are made of."""
    model, ids = EVERY[name], ids_of(2, 9)
    layers, norm = layers_of(model)
    seen = [[] for _ in layers]
    hooks = [
        layer.register_forward_hook(
            lambda _, given, returned, into=into: into.append(returned[0] if isinstance(returned, tuple) else returned)
        )
        for layer, into in zip(layers, seen, strict=True)
    ]
    try:
        options = {}
        if managed and name != "decision":
            options["past_key_values"] = model.decided_cache(evicting())
        output = model(ids, output_hidden_states=True, **options)
    finally:
        for hook in hooks:
            hook.remove()
    states = output.hidden_states
    assert len(states) == len(layers) + 1
    assert [len(into) for into in seen] == [3 if options else 1] * len(layers)
    for state, into in zip(states[1:-1], seen[:-1], strict=True):
        assert torch.equal(state, torch.cat(into, 1))
    assert torch.equal(states[-1], norm(torch.cat(seen[-1], 1)))
    if name != "decision":
        assert torch.equal(states[0], model.get_input_embeddings()(ids))
        assert torch.equal(output.logits, model.lm_head(states[-1]))
    kept = model(ids, output_hidden_states=True, logits_to_keep=2)
    assert kept.logits.shape[1] == 2
    assert {state.shape[1] for state in kept.hidden_states} == {9}


@with_memory
def test_generated_texts_come_with_hidden_states(name):
    model = EVERY[name]
    made = model.generate(
        ids_of(3, 5), max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [step[-1].shape[1] for step in made.hidden_states] == [5, 1, 1]
    assert torch.equal(model.lm_head(made.hidden_states[-1][-1])[:, -1].argmax(-1), made.sequences[:, -1])


@every_model
def test_tuples_where_no_dictionary_is_wanted(name):
    model, ids = EVERY[name], ids_of(4, 6)
    loss, logits, cache, *states = model(ids, labels=ids, return_dict=False, use_cache=True, output_hidden_states=True)
    assert torch.equal(logits, model(ids).logits)
    assert float(loss) > 0
    assert cache.get_seq_length() == 6
    assert len(states) == 1
    model.config.return_dict, before = False, model.config.return_dict
    try:
        assert torch.equal(model(ids)[0], logits)
    finally:
        model.config.return_dict = before


@every_model
def test_a_cache_is_taken_by_both_names(name):
    model, ids = EVERY[name], ids_of(5, 9)
    whole = model(ids).logits
    for argument in ("past_key_values", "cache"):
        first = model(ids[:, :4], use_cache=True)
        cache = first.past_key_values if "past_key_values" in first else first.cache
        torch.testing.assert_close(model(ids[:, 4:], **{argument: cache}).logits, whole[:, 4:], rtol=1e-4, atol=1e-4)


# ---- refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\).* at least one row and one token"),
    ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"shape \(0, 3\).* at least one row and one token"),
    ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\).* give integers \(batch, tokens\)"),
    ({"input_ids": torch.zeros(1, 3)}, "type torch.float32; give integers"),
    ({"input_ids": [[1, 2]]}, "was given a list; give a tensor of integers"),
    ({}, "was given none; give a tensor of integers"),
    ({"inputs_embeds": torch.zeros(1, 2, 24)}, "reads tokens: it was given inputs_embeds"),
    ({"input_ids": ids_of(0, 4), "output_hidden_states": [1]}, "all layers' or none: write True or False"),
    ({"input_ids": ids_of(0, 4), "output_attentions": True}, "cannot return attention weights"),
    ({"input_ids": ids_of(0, 4), "labels": ids_of(0, 3)}, r"labels of shape \(2, 3\) for input_ids of shape \(2, 4\)"),
    ({"input_ids": ids_of(0, 4), "labels": ids_of(0, 4), "logits_to_keep": 1}, "needs the logits of every token"),
]  # fmt: skip


@every_model
def test_what_cannot_be_answered_is_refused(name):
    """With a sentence, and before anything is read: the cache goes on as if nothing had been asked."""
    model, ids = EVERY[name], ids_of(6, 8)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    for arguments, message in REFUSED:
        with pytest.raises(ModelError, match=message):
            model(**arguments, past_key_values=cache)
    logits = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_a_decision_transformer_returns_attention_weights_that_it_computes():
    model, ids = tiny_decision(), ids_of(7, 6)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    assert len(weights) == 3
    for layer in weights:
        assert layer.shape == (2, 4, 6, 6)
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, 6))
        assert float(layer.triu(1).abs().max()) == 0


@with_memory
def test_training_keeps_no_memory_unless_it_is_asked_for(name):
    model, ids = copy.deepcopy(MODELS[name]).train(), ids_of(0, 3)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    cache = model.new_cache()
    assert model(ids, use_cache=False, past_key_values=cache).past_key_values is cache
    assert model.eval()(ids, use_cache=False).past_key_values is None
