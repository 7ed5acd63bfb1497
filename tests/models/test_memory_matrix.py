"""The transformer with memory matrices: against plain loops, in pieces, with padding, saved, and generating."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, DynamicCache

from evomem.errors import CacheError, ConfigError, ModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EvaluationProtocol
from evomem.managers import build
from evomem.memory.explicit.matrix import MatrixCache, MatrixLayer
from evomem.memory.explicit.matrix_rules import RULES
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.loading import load as load_model
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.data import zoo_tokenizer
from experiments.zoo.matrix_recall import own_recall, with_slots
from tests.support.slow_matrix import SlowMatrix

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "window": 4,
    "matrix_slots": 5, "matrix_width": 6, "matrix_heads": 2, "initializer_range": 0.4,
}  # fmt: skip


def tiny(rule="erase_add", *, seed=0, **changes):
    """A random model in fp64."""
    torch.manual_seed(seed)
    return MemoryMatrix(MemoryMatrixConfig(**{**SIZES, "rule": rule, **changes})).eval().double().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return tiny(decay=0.9, decay_per_slot=True, reach=2)


def ids_of(seed, tokens, batch=2):
    return torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_pieces_are_the_whole(model, seed, cuts):
    ids, cache = ids_of(seed, 20), model.new_cache()
    ends = sorted({*cuts, 20} - {0})
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip([0, *ends], ends, strict=False)]
    whole = model(ids)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-8, atol=1e-8)
    for name, tensor in whole.past_key_values.tensors().items():
        torch.testing.assert_close(cache.tensors()[name], tensor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_attention_is_that_of_plain_loops(rule):
    """One token after another: read M, attend to window and rows by extended keys and values, then write."""
    model = tiny(rule, decay=0.8, num_hidden_layers=1)
    attention, (batch, tokens) = model.blocks[0].attention, (2, 7)
    memory, heads, size = attention.memory, 4, 4
    hidden = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positions, real = torch.arange(tokens)[None], torch.ones(batch, tokens, dtype=torch.bool)
    output = attention(hidden, positions, real, MatrixLayer())
    for row in range(batch):
        matrices = [SlowMatrix(memory.initial[head].tolist(), rule, [0.8] * 5) for head in range(2)]
        keys, values = [], []
        for token in range(tokens):
            x = hidden[row, token]
            inputs = torch.cat((x, hidden[row, token - 1] if token else torch.zeros_like(x)))
            query, key, value = (p(x).view(heads, size) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            keys, values = [*keys, key][-4:], [*values, value][-4:]
            mixed = []
            for head in range(heads):
                group, member = divmod(head, 2)
                matrix = matrices[group]
                read_key = memory.read_key(inputs).view(2, 6)[group]
                context = torch.tensor(matrix.read(read_key.tolist())[0], dtype=torch.float64)
                q = query[head] + context @ attention.context_query[group, member]
                rows = torch.tensor(matrix.rows, dtype=torch.float64)
                scores = [float(q @ (one @ attention.row_key[group, member])) for one in rows]
                near = range(-len(keys) + 1, 1)
                turned = [turn(keys[back - 1][head], token + back) for back in near]
                scores += [float(turn(q, token) @ one) for one in turned]
                shares = torch.softmax(torch.tensor(scores, dtype=torch.float64) / math.sqrt(size), 0)
                seen = [*(rows @ attention.row_value[group, member]), *(one[head] for one in values)]
                mixed.append(sum(share * one for share, one in zip(shares, seen, strict=True)))
            torch.testing.assert_close(output[row, token], attention.o_proj(torch.cat(mixed)), rtol=1e-8, atol=1e-8)
            for group, matrix in enumerate(matrices):
                parts = {
                    "key": memory.write_key, "value": memory.write_value, "erase": getattr(memory, "erase", None),
                    "forget_key": getattr(memory, "forget_key", None),
                }  # fmt: skip
                write = {name: p(inputs).view(2, 6)[group] for name, p in parts.items() if p is not None}
                if rule == "erase_add":
                    write["erase"] = write["erase"].sigmoid()
                write["store"] = memory.store(inputs)[group].sigmoid()
                if rule == "gated":
                    write |= {name: getattr(memory, name)(inputs)[group] for name in ("input_bias", "forget_bias")}
                matrix.write({name: part.tolist() for name, part in write.items()})


def turn(x, position):
    """Return x (4,) rotated to a position."""
    out = x.clone()
    for pair, angle in enumerate((position * 1.0, position * 0.01)):
        a, b = float(x[pair]), float(x[pair + 2])
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@examples(max_examples=10)
@given(seed=st.integers(0, 1000), token=st.integers(0, 11))
def test_no_token_sees_a_later_one(model, seed, token):
    ids = ids_of(seed, 12)
    other = ids.clone()
    other[:, token] = (other[:, token] + 1) % 20
    one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :token], two[:, :token])
    assert not torch.equal(one[:, token], two[:, token])


def test_without_a_matrix_nothing_beyond_the_window_is_seen():
    """With one, it is: what was read first changes what is said 30 tokens later."""
    for slots, reaches in ((0, False), (5, True)):
        model, ids = tiny(matrix_slots=slots), ids_of(0, 30)
        other = ids.clone()
        other[:, 0] = (other[:, 0] + 1) % 20
        assert torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1]) != reaches


def test_padding_on_the_left_is_not_there(model):
    ids = ids_of(3, 9)
    padded = torch.cat((ids_of(4, 3), ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    cache = model.new_cache()
    model(padded[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    logits = model(padded[:, 5:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 2:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layers", [None, [1], []])
def test_a_saved_memory_goes_on_to_the_bit(layers):
    model = tiny(matrix_layers=layers)
    cache, ids = model.new_cache(), ids_of(5, 11)
    model(ids[:, :6], past_key_values=cache)
    data = save({name: tensor.contiguous() for name, tensor in cache.tensors().items()})
    again = MatrixCache.of(load(data), 2)
    one, two = (model(ids[:, 6:], past_key_values=kept).logits for kept in (cache, again))
    assert torch.equal(one, two)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in cache.tensors().items())


def test_generate_is_the_loop(model):
    """Greedy, with and without a cache of one's own; beams reorder rows; bytes stay as they are."""
    ids = ids_of(6, 8)
    slow = ids
    for _ in range(6):
        slow = torch.cat((slow, model(slow).logits[:, -1:].argmax(-1)), 1)
    cache = model.new_cache()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), slow)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache), slow)
    held = cache.nbytes()
    model(slow[:, -1:], past_key_values=cache)
    assert cache.nbytes() == held
    assert cache.get_seq_length() == 14
    one, two = (model.generate(ids, max_new_tokens=6, num_beams=3, use_cache=uses) for uses in (True, False))
    assert torch.equal(one, two)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_saved_loaded_and_trains(rule, tmp_path):
    model = tiny(rule, decay=0.9, decay_per_slot=rule != "leaky")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = ids_of(7, 10)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    model.train().requires_grad_(True)
    out = model(ids)
    assert out.past_key_values is None
    out.logits.square().mean().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())


def test_a_folder_is_loaded_as_every_model_is(tmp_path):
    tokenizer = zoo_tokenizer()
    model = tiny(vocab_size=len(tokenizer)).float()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded.model(ids_of(9, 7)).logits, model(ids_of(9, 7)).logits)
    evaluator = Evaluator(loaded, EvaluationProtocol(kind="streaming", every=4))
    task = build_task("zoo_recall", loaded.tokenizer, 48)
    samples = task.samples(Split.SELECT, 2, 0)
    own = own_recall(evaluator, with_slots(loaded.model, 3), samples)
    assert own != own_recall(evaluator, loaded.model, samples)
    assert own != own_recall(evaluator, with_slots(loaded.model, 3), samples, empties=True)


def test_half_precision_decides_in_single():
    model = tiny(seed=3).bfloat16()
    cache = model(ids_of(8, 9)).past_key_values
    assert cache.layers[0].matrix.dtype == torch.float32
    assert cache.layers[0].window_keys.dtype == torch.bfloat16


def test_what_cannot_be_is_refused(model):
    for wrong, message in (
        ({"rule": "lstm"}, "erase_add"), ({"hidden_size": 20}, "even size"), ({"matrix_heads": 3}, "share"),
        ({"decay": 0.0}, "decay"), ({"decay": 1.0, "decay_per_slot": True}, "decay"), ({"reach": -1}, "counts"),
        ({"window": 0}, "window"), ({"intermediate_size": 0}, "intermediate_size"),
        ({"matrix_layers": [2]}, "numbers of layers"),
        ({"matrix_layers": [0, 0]}, "each once"), ({"matrix_layers": [1, 0]}, "ascending"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            MemoryMatrixConfig(**{**SIZES, **wrong})
    with pytest.raises(ModelError, match="new_cache"):
        model(ids_of(0, 3), past_key_values=DynamicCache())
    with pytest.raises(ModelError, match="padding"):
        model(ids_of(0, 3), attention_mask=torch.ones(2, 1, 3, 3))


@pytest.mark.parametrize("decided", [False, True])
def test_padding_between_tokens_and_other_rows_are_refused(model, decided):
    """The window and the looks back would run through padding: logits were off by whole numbers, in silence."""
    ids = ids_of(0, 6)
    rows = len(ids)

    def cache():
        return model.decided_cache(build("lru", budget=4, every=1)) if decided else model.new_cache()

    mask = torch.ones(rows, 6, dtype=torch.int64)
    mask[0, 2] = 0
    with pytest.raises(CacheError, match=r"padding between tokens.*on the left"):
        model(ids, attention_mask=mask, past_key_values=cache())
    ends, read = torch.ones(rows, 6, dtype=torch.int64), cache()
    ends[0, 4:] = 0
    alone = model(ids[:1, :4]).logits
    if not decided:  # as long as nothing comes behind it, padding on the right is harmless
        torch.testing.assert_close(model(ids, attention_mask=ends).logits[:1, :4], alone, atol=1e-5, rtol=1e-4)
    model(ids, attention_mask=ends, past_key_values=read)
    with pytest.raises(CacheError, match="padding between tokens"):
        model(ids[:, :1], attention_mask=torch.cat((ends, ends[:, :1]), 1), past_key_values=read)
    with pytest.raises(CacheError, match="rows, and the input has 1"):
        model(ids[:1], past_key_values=read)
    with pytest.raises(ModelError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(rows + 1, 6))
