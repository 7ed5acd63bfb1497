"""Drivers: one CMA-ES per head, and the parts of a vector that are a head's."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from evomem.drivers import build
from evomem.drivers.base import Fitness, Stage
from evomem.errors import ConfigError, FitnessError
from evomem.search_space.space import SearchSpace, SpaceConfig

HEADS, WIDTH, SHARED = 6, 4, 5
DIM = HEADS * WIDTH + SHARED
PERMUTED = np.random.default_rng(5).permutation(DIM)
BLOCKS = [np.sort(PERMUTED[WIDTH * n : WIDTH * (n + 1)]) for n in range(HEADS)]
REST = np.sort(PERMUTED[HEADS * WIDTH :])

VARIANTS = [{}, {"popsize": 9, "block_sigma": 0.1}, {"shared_diagonal": False}, {"search": "random"}]
every_variant = pytest.mark.parametrize("options", VARIANTS)


def new(options=None, seed=3):
    return build("block_cmaes", DIM, np.full(DIM, 1.5), seed, blocks=BLOCKS, **(options or {}))


def by_head(vectors):
    return np.stack([-(vectors[:, block] ** 2).sum(1) for block in BLOCKS], axis=1)


def shared(vectors):
    return -(vectors[:, REST] ** 2).sum(1)


def step(driver, *, headwise, holes=0):
    """One generation; ``holes`` spoils every so-manieth number."""
    driver.enter(Stage(per_head=headwise))
    population = driver.ask()
    heads = by_head(population.vectors)
    fitness = heads.mean(1) if headwise else shared(population.vectors)
    if holes:
        heads.ravel()[holes::7] = np.nan
        fitness[holes % 3 :: 4] = (np.nan, np.inf, -np.inf)[holes % 3]
    driver.tell(population, Fitness(fitness, heads if headwise else None))
    return population


# ---- the driver -----------------------------------------------------------------------------------------------------


@every_variant
def test_asks_what_it_is_told_to(options):
    driver = new(options)
    for generation in range(8):
        driver.enter(Stage(per_head=generation % 4 < 2))
        asked, again = driver.ask(), driver.ask()
        assert asked.generation == again.generation == generation
        assert np.array_equal(asked.vectors, again.vectors)
        assert asked.vectors.shape == (driver.popsize, DIM)
        assert asked.vectors.dtype == np.float64
        assert len(np.unique(asked.vectors, axis=0)) == len(asked.vectors)
        assert len(set(asked.seeds.tolist())) == len(asked.seeds)
        told = step(driver, headwise=generation % 4 < 2)
        assert np.array_equal(told.vectors, asked.vectors)
    with pytest.raises(ConfigError, match="tell"):
        driver.tell(asked, Fitness(shared(asked.vectors)))


@every_variant
def test_a_stage_moves_its_own_part_only(options):
    driver, start = new(options), np.full(DIM, 1.5)
    heads = np.concatenate(BLOCKS)
    for headwise, moving, still in ((True, heads, REST), (False, REST, heads), (True, heads, REST)):
        before = driver.mean
        for _ in range(5):
            population = step(driver, headwise=headwise)
            assert np.array_equal(population.vectors[:, still], np.tile(before[still], (driver.popsize, 1)))
            assert np.all(population.vectors[:, moving] != before[moving])
            assert np.array_equal(driver.mean[still], before[still])
        assert np.any(driver.mean[moving] != before[moving])
    assert not np.any(driver.mean == start)


@every_variant
def test_resumes_bit_exactly_between_ask_and_tell_and_after(options):
    """Save at every point of two stages with holes in the fitness; what follows is what would have followed."""
    plan = [True] * 12 + [False] * 8 + [True] * 4
    whole, saved, trace = new(options), [], []
    for generation, headwise in enumerate(plan):
        whole.enter(Stage(per_head=headwise))
        saved.append((generation, pickle.dumps(whole.state_dict())))
        whole.ask()
        saved.append((generation, pickle.dumps(whole.state_dict())))
        population = step(whole, headwise=headwise, holes=1 + generation)
        trace.append((population, whole.mean, whole.sigma))
        saved.append((generation + 1, pickle.dumps(whole.state_dict())))
    for begin, state in saved[::5] + saved[-2:]:
        resumed = new(options)
        resumed.load_state_dict(pickle.loads(state))
        for generation in range(begin, len(plan)):
            population = step(resumed, headwise=plan[generation], holes=1 + generation)
            expected, mean, sigma = trace[generation]
            assert population.generation == expected.generation == generation
            assert np.array_equal(population.vectors, expected.vectors)
            assert np.array_equal(population.seeds, expected.seeds)
            assert np.array_equal(resumed.mean, mean)
            assert resumed.sigma == sigma
        assert resumed.stopped() is None


def test_same_seed_same_search_and_heads_of_one_seed_differ():
    def run(seed):
        driver = new(seed=seed)
        for headwise in (True, True, False):
            step(driver, headwise=headwise)
        driver.enter(Stage(per_head=True))
        return driver.ask().vectors

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    first = new()
    first.enter(Stage(per_head=True))
    parts = [first.ask().vectors[:, block] for block in BLOCKS]
    assert not any(np.array_equal(parts[0], part) for part in parts[1:])


def test_a_head_learns_from_its_own_fitness_only():
    """Turning one head's fitness round changes that head's search and no other."""
    one, other = new(), new()
    for _ in range(4):
        for driver, sign in ((one, 1), (other, -1)):
            driver.enter(Stage(per_head=True))
            population = driver.ask()
            heads = by_head(population.vectors)
            heads[:, 2] *= sign
            driver.tell(population, Fitness(heads.mean(1), heads))
    differs = [not np.array_equal(one.mean[block], other.mean[block]) for block in BLOCKS]
    assert differs == [False, False, True, False, False, False]


def test_a_generation_that_is_refused_changes_nothing():
    driver, untouched = new(), new()
    driver.enter(Stage(per_head=True))
    population = driver.ask()
    heads = by_head(population.vectors)
    heads[:, 4] = np.nan
    with pytest.raises(FitnessError):
        driver.tell(population, Fitness(heads.mean(1), heads))
    driver.tell(population, Fitness(np.zeros(len(heads)), by_head(population.vectors)))
    step(untouched, headwise=True)
    for _ in range(3):
        assert np.array_equal(step(driver, headwise=True).vectors, step(untouched, headwise=True).vectors)
    driver.enter(Stage(per_head=False))
    population = driver.ask()
    with pytest.raises(FitnessError):
        driver.tell(population, Fitness(np.full(len(population.vectors), np.nan)))
    assert np.array_equal(driver.ask().vectors, population.vectors)


def test_converges_far_faster_than_one_search_over_everything():
    """A separable sphere whose heads have fitness of their own, at equal evaluations."""
    heads, width, generations, popsize = 40, 4, 30, 12
    dim = heads * width + 2
    blocks = [np.arange(width * n, width * (n + 1)) for n in range(heads)]
    target = np.random.default_rng(0).standard_normal(dim)

    def loss(vectors):
        return ((vectors - target)[:, : heads * width].reshape(len(vectors), heads, width) ** 2).sum(-1)

    parts = build("block_cmaes", dim, np.zeros(dim), 0, blocks=blocks, popsize=popsize, sigma=0.5)
    whole = build("cmaes", dim, np.zeros(dim), 0, popsize=popsize, sigma=0.5, diagonal=True)
    parts.enter(Stage(per_head=True))
    for _ in range(generations):
        asked = parts.ask()
        parts.tell(asked, Fitness(-loss(asked.vectors).mean(1), -loss(asked.vectors)))
        asked = whole.ask()
        whole.tell(asked, Fitness(-loss(asked.vectors).mean(1)))
    start, mine, other = (loss(v[None]).mean() for v in (np.zeros(dim), parts.mean, whole.mean))
    assert mine < 0.01 * start
    assert other > 0.1 * start


def test_random_search_believes_in_each_heads_best():
    driver, seen = new({"search": "random", "sigma": 0.5, "block_sigma": 0.2, "popsize": 8}), []
    for _ in range(40):
        population = step(driver, headwise=True)
        seen.append(population.vectors)
    vectors = np.concatenate(seen)
    for head, block in enumerate(BLOCKS):
        best = vectors[by_head(vectors)[:, head].argmax()]
        assert np.array_equal(driver.mean[block], best[block])
    draws = (vectors[:, np.concatenate(BLOCKS)] - 1.5) / 0.2
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 1) < 0.05
    for _ in range(40):
        seen.append(step(driver, headwise=False).vectors)
    vectors = np.concatenate(seen[40:])
    assert np.array_equal(driver.mean[REST], vectors[shared(vectors).argmax()][REST])
    assert abs(((vectors[:, REST] - 1.5) / 0.5).std() - 1) < 0.1


def test_sigma_is_that_of_the_part_that_moves():
    driver = new({"sigma": 0.7, "block_sigma": 0.2})
    assert driver.sigma == 0.7
    driver.enter(Stage(per_head=True))
    assert driver.sigma == 0.2


def test_clear_errors():
    plain = build("block_cmaes", 4, np.zeros(4), 0)
    with pytest.raises(ConfigError, match=r"belongs to one head.*layers and heads"):
        plain.enter(Stage(per_head=True))
    only = build("block_cmaes", 4, np.zeros(4), 0, blocks=[np.arange(2), np.arange(2, 4)])
    with pytest.raises(ConfigError, match="shared"):
        only.enter(Stage(per_head=False))
    driver = new()
    driver.enter(Stage(per_head=True))
    population = driver.ask()
    count = len(population.vectors)
    for heads, message in (
        (None, "learns from per_head"),
        (np.zeros((count, HEADS + 1)), rf"{HEADS} heads.*layers and heads"),
        (np.zeros(HEADS), rf"per head of {count} candidates"),
    ):
        with pytest.raises(ConfigError, match=message):
            driver.tell(population, Fitness(np.zeros(len(population.vectors)), heads))
    with pytest.raises(ConfigError, match="between ask"):
        driver.enter(Stage(per_head=False))
    with pytest.raises(ConfigError, match="overlap"):
        build("block_cmaes", 4, np.zeros(4), 0, blocks=[np.arange(2), np.arange(1, 3)])
    with pytest.raises(ConfigError, match=r"outside 0\.\.3"):
        build("block_cmaes", 4, np.zeros(4), 0, blocks=[np.arange(2), np.arange(3, 5)])
    with pytest.raises(ConfigError, match="2 dimensions"):
        build("block_cmaes", 4, np.zeros(4), 0, blocks=[np.arange(1), np.arange(1, 3)])
    with pytest.raises(ConfigError, match="search"):
        build("block_cmaes", 4, np.zeros(4), 0, search="grid")


# ---- blocks of a search space ---------------------------------------------------------------------------------------

LAYERS, KV_HEADS, NAMES = 3, 2, ["keydiff", "value_norm", "age"]
WEIGHTS = [{"match": "log_shares"}, {"match": "own", "scale": 0.5}, {"match": "weights", "scale": 2.0}]


def space(weights=WEIGHTS, **options):
    manager = {"features": NAMES, "layers": LAYERS, "heads": KV_HEADS, "knots": 2, "allocation": 2, **options}
    config = {"manager": {"name": "feature_scorer", "options": manager}, "weights": weights, "sigma": 0.3}
    return SearchSpace(SpaceConfig(**config, options={"recent": {"kind": "integer", "low": 0, "high": 9}}))


def test_blocks_are_a_partition_of_the_heads_weights():
    whole = space()
    blocks = whole.blocks()
    assert [len(block) for block in blocks] == [len(NAMES)] * (LAYERS * KV_HEADS)
    used = np.concatenate(blocks)
    assert len(np.unique(used)) == len(used) == LAYERS * KV_HEADS * len(NAMES)
    assert whole.dim - len(used) == 2 * len(NAMES) + 2 + 1  # common weights, log shares, one option
    base = np.random.default_rng(0).standard_normal(whole.dim)
    before = whole.decode(base)
    for number, block in enumerate(blocks):
        moved = base.copy()
        moved[block] += 1.0
        after = whole.decode(moved)
        change = after.own - before.own
        layer, head = divmod(number, KV_HEADS)
        torch.testing.assert_close(change[layer, head], torch.full((len(NAMES),), 0.5))
        change[layer, head] = 0
        assert torch.all(change == 0)
        for name in ("weights", "log_shares"):
            assert torch.equal(getattr(after, name), getattr(before, name))
        assert after.options == before.options
    moved = base + np.where(np.isin(np.arange(whole.dim), used), 0.0, 1.0)
    assert torch.equal(whole.decode(moved).own, before.own)
    assert not torch.equal(whole.decode(moved).weights, before.weights)


def test_without_weights_per_head_there_are_no_blocks():
    assert space(layers=0, heads=0, weights="all").blocks() == []
    assert space(weights=[{"match": "weights"}]).blocks() == []
