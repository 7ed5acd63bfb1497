"""The effective number of writes: a list says the same; padding, pieces and weak writes do not move it."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import build
from evomem.memory.explicit import PairMemory
from evomem.memory.explicit.matrix_rows import MatrixRows
from evomem.memory.explicit.matrix_rules import Write
from evomem.testing.models import tiny

ROWS, HEADS, TOKENS, WIDTH = 2, 2, 12, 5
SPEC = "effective_writes"


def drawn(seed=0, tokens=TOKENS):
    """Return values (rows, heads, tokens, width) and gates (rows, heads, tokens) of random writes."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, HEADS, tokens, WIDTH, generator=draw)
    return values, torch.rand(ROWS, HEADS, tokens, generator=draw)


def read(values, gates, cuts=(), real=None, keep=None):
    """Return a memory that has read the writes, in pieces; ``keep`` rows stay after each."""
    memory = MatrixRows(observes=frozenset({SPEC}))
    for begin, end in zip([0, *cuts], [*cuts, values.shape[2]], strict=True):
        part = values[:, :, begin:end]
        write = Write(part, part, gates[:, :, begin:end])
        memory.exchange(write, part, "leaky", None, None, None if real is None else real[:, begin:end])
        memory.finish(end - begin)
        if keep is not None:
            memory.keep(memory.view().age < keep)
    return memory


def number(values, gates, **given):
    return read(values, gates, **given).view().recorded[SPEC]


@pytest.mark.parametrize("cuts", [(), (1, 2, 7), tuple(range(1, TOKENS))], ids=["whole", "pieces", "each"])
@pytest.mark.parametrize("keep", [None, 1])
def test_sums_of_a_list_say_the_same_whatever_has_left(cuts, keep):
    values, gates = drawn()
    slow = torch.empty(ROWS, HEADS)
    for row in range(ROWS):
        for head in range(HEADS):
            strengths = [
                sum((float(gate) * x) ** 2 for x in value)
                for value, gate in zip(values[row, head].tolist(), gates[row, head], strict=True)
            ]
            slow[row, head] = sum(strengths) ** 2 / sum(s * s for s in strengths)
    torch.testing.assert_close(number(values, gates, cuts=cuts, keep=keep), slow)


@pytest.mark.parametrize("stored", [1, 3, TOKENS])
@pytest.mark.parametrize("filler", [0, 50])
def test_n_writes_of_one_length_are_n_however_much_filler_is_read(stored, filler):
    values = torch.randn(ROWS, HEADS, TOKENS + filler, WIDTH)
    values = 3 * values / values.norm(dim=-1, keepdim=True)
    gates = torch.zeros(values.shape[:3])
    gates[:, :, torch.randperm(TOKENS + filler)[:stored]] = 1
    torch.testing.assert_close(number(values, gates), torch.full((ROWS, HEADS), float(stored)))


def test_a_memory_of_nothing_has_none():
    values, gates = drawn()
    assert number(values, 0 * gates).tolist() == [[0.0] * HEADS] * ROWS


def test_padding_does_not_move_it():
    values, gates = drawn()
    real = torch.arange(TOKENS).expand(ROWS, TOKENS) >= torch.tensor([[0], [5]])
    alone = number(values[1:, :, 5:], gates[1:, :, 5:])
    torch.testing.assert_close(number(values, gates, real=real)[1:], alone)
    torch.testing.assert_close(number(values, gates, real=real)[:1], number(values[:1], gates[:1]))


def test_it_goes_with_rows_that_are_selected():
    """Saved states are tried by the conformance checks (`test_kinds`)."""
    values, gates = drawn()
    memory = read(values[:, :, :6], gates[:, :, :6])
    memory.batch_select_indices(torch.tensor([1, 1]))
    rest = values[[1, 1], :, 6:]
    memory.exchange(Write(rest, rest, gates[[1, 1], :, 6:]), rest, "leaky", None, None, None)
    memory.finish(6)
    torch.testing.assert_close(memory.view().recorded[SPEC], number(values, gates)[[1, 1]])


def test_memories_that_store_every_write_alike_refuse_it():
    with pytest.raises(ConfigError, match="needs writes of different strength, which a pair memory"):
        PairMemory(observes=frozenset({SPEC}))
    manager, model = build("keydiff", budget=8, allocation="by_effective_writes"), tiny("llama", layers=1)
    with pytest.raises(ConfigError, match="writes of different strength, which a KV cache"), manager.attach(model):
        pass
