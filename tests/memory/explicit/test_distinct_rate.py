"""The distinct-key rate: a list of Python says the same, in pieces too; requests that do not read do not move it."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import ConfigError
from evomem.managers import build
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.memory.observations.distinct_rate import SHARPNESS
from evomem.testing.models import tiny
from tests.support.slow_pairs import cosine

WIDTH, ROWS, HEADS, TOKENS, DIM, NAMES = 4, 2, 2, 40, 6, 12
SPEC = f"distinct_rate:{WIDTH}"


def requests(reads=0.7, seed=0):
    """Return keys (rows, heads, tokens, dim), values, names and reads of random requests."""
    draw = torch.Generator().manual_seed(seed)
    names = torch.randint(0, NAMES, (ROWS, HEADS, TOKENS), generator=draw)
    keys = torch.randn(NAMES, DIM, generator=draw)[names]
    return keys, keys, names, torch.rand(names.shape, generator=draw) < reads


def observed(requests, pieces=None):
    """Return what a memory that keeps everything observes: (rows, heads)."""
    keys, values, names, reads = requests
    memory, begin = PairMemory(observes=frozenset({SPEC})), 0
    for piece in pieces or (keys.shape[2],):
        part = (slice(None), slice(None), slice(begin, begin + piece))
        memory.feed(keys[part], values[part], names[part], reads=reads[part], absent=True)
        begin += piece
    assert begin == keys.shape[2]
    return memory.view().recorded[SPEC]


def slow(keys, reads):
    """Return the rate of one head: keys (tokens, dim), reads (tokens,)."""
    known, new, weight = [], 0.0, 0.0
    for key, read in zip(keys.tolist(), reads.tolist(), strict=True):
        if not read:
            continue
        likeness = max([max(0.0, cosine(key, old)) for old in known[-WIDTH:]], default=0.0) ** SHARPNESS
        new, weight = new * (1 - 1 / WIDTH) + 1 - likeness, weight * (1 - 1 / WIDTH) + 1
        known.append(key)
    return new / weight if weight else 1.0


@pytest.mark.parametrize("reads", [1.0, 0.6, 0.05, 0.0])
@pytest.mark.parametrize("pieces", [(TOKENS,), (1,) * TOKENS, (7, 1, 2, 20, 10)], ids=["whole", "each", "pieces"])
def test_a_list_says_the_same(reads, pieces):
    drawn = requests(reads)
    wanted = [[slow(drawn[0][row, head], drawn[3][row, head]) for head in range(HEADS)] for row in range(ROWS)]
    torch.testing.assert_close(observed(drawn, pieces), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_its_limits_are_one_key_and_only_new_keys():
    keys, values, names, reads = requests(1.0)
    same = [part[:, :, :1].expand_as(part).contiguous() for part in (keys, values, names)]
    assert observed((*same, reads)).max() < 0.01
    fresh = torch.eye(TOKENS).expand(ROWS, HEADS, TOKENS, TOKENS).contiguous()
    numbers = torch.arange(TOKENS).expand(ROWS, HEADS, TOKENS).contiguous()
    torch.testing.assert_close(observed((fresh, fresh, numbers, reads)), torch.ones(ROWS, HEADS))


def test_requests_that_do_not_read_do_not_move_it():
    keys, values, names, reads = requests(1.0)
    idle = torch.randn(ROWS, HEADS, 2 * TOKENS, DIM)
    idle[:, :, ::2] = keys
    longer = torch.full((ROWS, HEADS, 2 * TOKENS), NAMES)
    longer[:, :, ::2] = names
    asked = torch.zeros(longer.shape, dtype=torch.bool)
    asked[:, :, ::2] = True
    torch.testing.assert_close(observed((idle, idle, longer, asked)), observed((keys, values, names, reads)))


def test_a_memory_goes_on_with_it_to_the_bit_and_a_wrong_state_is_refused():
    keys, values, names, reads = requests()
    manager = build("lru", budget=8, allocation=f"by_distinct_rate(window={WIDTH})")
    half, caches = TOKENS // 2, [ExplicitCache([PairMemory(observes=manager.observes)], manager) for _ in range(2)]
    first, second = (tuple(part[:, :, one] for part in (keys, values, names, reads))
                     for one in (slice(half), slice(half, None)))  # fmt: skip
    caches[0].layers[0].feed(*first[:3], reads=first[3], absent=True)
    caches[0].decide()
    facts, tensors = caches[0].state()
    caches[1].load_state(facts, {name: tensor.clone() for name, tensor in tensors.items()})
    for cache in caches:
        cache.layers[0].feed(*second[:3], reads=second[3], absent=True)
        cache.decide()
    for name, tensor in caches[0].state()[1].items():
        assert torch.equal(tensor, caches[1].state()[1][name])
    tensors[f"0.rowwise.{SPEC}.sums"] = torch.zeros(ROWS, HEADS, 3)
    with pytest.raises(Exception, match="sums"):
        caches[1].load_state(facts, tensors)


def test_a_kv_cache_refuses_it():
    manager, model = build("keydiff", budget=8, allocation="by_distinct_rate"), tiny("llama", layers=1)
    with pytest.raises(ConfigError, match="queries without positions, which a KV cache"), manager.attach(model):
        pass
