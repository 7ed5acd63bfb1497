"""Decisions are composed once, deployed and drawn; the likelihood of what is drawn counts everything that decides."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from evomem.errors import ConfigError
from evomem.evaluation.rollouts import DrawnRows
from evomem.managers import MemoryManager, StochasticManager, build, managers, names, plackett_luce
from evomem.managers.learned.kv_policy import SHARE_SPREAD
from evomem.managers.stochastic import Action, Noise
from tests.managers.test_kv_policy import looked_at, made
from tests.support.ragged_view import HEADS


def test_nobody_composes_a_decision_by_himself():
    for name in names():
        kind = managers.get(name)
        for method in ("decide", "decide_all", "forward"):
            assert getattr(kind, method) is getattr(MemoryManager, method), (name, method)
        if issubclass(kind, StochasticManager):
            assert kind.carry_out is StochasticManager.carry_out
        assert not hasattr(kind, "select")
        assert not hasattr(kind, "selection")


@pytest.mark.parametrize("options", [{"sinks": 2, "recent": 3}, {}])
def test_where_nothing_is_shared_adakv_is_what_is_inside(options):
    """With a safeguard of 1; refused tokens leave their places to the next best in either."""
    for seed in range(3):
        view = looked_at(seed)
        inside = made(("evict", "store"), seed, budget=10, **options)
        around = build(
            {"name": "adakv", "options": {"safeguard": 1.0, "inner": inside.with_options(budget=None).describe()}}
        )
        around = around.with_options(budget=10)
        around.inner.load_state_dict(inside.state_dict())
        # Also of the second row, whose heads cannot fill their slots: nothing is shared, so nothing is handed on.
        assert torch.equal(around.decide(view).keep, inside.decide(view).keep)
        assert inside.decide(view).keep[1].sum() < 10 * HEADS
        assert inside.decide(view).keep[0].sum(-1).tolist() == [10] * HEADS
        stored = inside.rule.candidates(view, inside.judge(view).stored)
        assert torch.equal(inside.decide(view).keep.sum(-1), stored.sum(-1).clamp(max=10))


@pytest.mark.parametrize("safeguard", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_what_a_head_cannot_fill_is_shared_if_anything_is(safeguard):
    """One head stores two tokens, the others all: they get the rest, unless the safeguard is 1."""

    class Choosy(type(build("keydiff"))):
        def admit(self, view):
            few = torch.where(view.age < 2, 1.0, -1.0).expand(view.slots.shape).clone()
            few[:, 1:] = 1.0
            return few

    view = looked_at()
    view = replace(view.map(lambda part: part[:1]), fresh=view.seen)
    for allocation in ("uniform", "depth_shares(log_shares=[0.0])"):
        spec = f"across_heads(layers={allocation}, safeguard={safeguard})"
        keep = Choosy(budget=8, allocation=spec).decide(view).keep[0].sum(-1).tolist()
        assert min(2, int(safeguard * 8)) <= keep[0] <= 2
        assert min(keep[1:]) >= int(safeguard * 8)
        assert keep == [2] + [8] * (HEADS - 1) if safeguard == 1 else sum(keep) == 8 * HEADS
        if safeguard == 1:
            alone = Choosy(budget=8, allocation=allocation).decide(view).keep
            assert torch.equal(Choosy(budget=8, allocation=spec).decide(view).keep, alone)


def test_a_refused_token_is_refused_also_at_a_protected_end_and_leaves_its_place():
    class Refusing(type(build("keydiff"))):
        def admit(self, view):
            return torch.where(view.age == 1, -1.0, 1.0).expand(view.slots.shape)

    view = looked_at()
    for allocation in (None, "across_heads(safeguard=1.0)", "pyramid(beta=1)"):
        keep = Refusing(budget=8, allocation=allocation).decide(view).keep
        assert not keep[view.age == 1].any()
        assert keep[0].sum(-1).tolist() == [8] * HEADS


# ---- shares that are drawn ------------------------------------------------------------------------------------------


def small(layer, layers=3, slots=5, **options):
    """A view of five slots a head, one row, and a policy whose shares give its layers 1, 2 and 3 of them a head."""
    view = looked_at(1, layer=layer)
    parts = {name: getattr(view, name)[:1, :, -slots:] for name in ("keys", "values", "slots")}
    recorded = {k: v[:1, :, -slots:] if v.shape[:3] == view.slots.shape else v[:1] for k, v in view.recorded.items()}
    start = parts["slots"].amin((1, 2))
    view = replace(view, **parts, recorded=recorded, start=start, layers=layers, memo={}, fresh=view.seen)
    policy = made(("evict",), 3, budget=2, allocation=2, **options)
    with torch.no_grad():
        policy.log_shares.copy_(torch.tensor([-0.6, 0.6]))
    return policy, view


def whole_numbers(logs, layers, mean, layer):
    """The layer's slots by plain numbers."""
    places = [i / (layers - 1) for i in range(layers)]
    g = [float(logs[0]) * (1 - p) + float(logs[1]) * p for p in places]
    weights = torch.tensor(g).double().exp()
    until = [0, *torch.round(weights.cumsum(0) / weights.sum() * layers * mean).long().tolist()]
    return until[layer + 1] - until[layer]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_probabilities_of_all_decisions_add_up_to_one_whatever_the_layers_share(layer):
    """All orders of picks enumerated; each is a decision that keeps as many slots as the drawn shares say."""
    policy, view = small(layer)
    for shares in ([-0.6, 0.6], [0.0, 0.0], [0.9, -0.9]):
        n = whole_numbers(shares, 3, 2, layer)
        total = torch.zeros(HEADS, dtype=torch.float64)
        seen = set()
        for order in permutations(range(5)):
            ranking = torch.tensor(order).expand(1, HEADS, 5)
            action = Action(ranking=ranking, shares=torch.tensor([shares]))
            keep = policy.carry_out(view, action).keep
            assert keep.sum(-1).tolist() == [[n] * HEADS]
            if order[:n] in seen:
                continue
            seen.add(order[:n])
            # Without the shares' own density, which layer 0 counts, what is left is a probability of picks.
            own = density(policy, action) * float(layer == 0) * first_head()
            total += (policy.log_prob(view, action) - own)[0].exp().double()
        assert total.tolist() == pytest.approx([1.0] * HEADS, abs=1e-5)


def density(policy, action):
    mean = policy.log_shares.float()
    return torch.distributions.Normal(mean, SHARE_SPREAD).log_prob(action.shares[0]).sum()


def first_head():
    return torch.tensor([[1.0] + [0.0] * (HEADS - 1)])


def test_shares_count_once_in_the_likelihood_and_move_their_parameters():
    """E[r ∇log π] is the slope of E[r]: 1 in the first log-share for r = what was drawn for it, and 0 in the other."""
    policy, view = small(0)
    policy = policy.requires_grad_(True)
    count = 4000
    noise = Noise.of([(seed, 0) for seed in range(count)], view)
    with torch.no_grad():
        action = policy.draw(view, noise)
    assert torch.equal(action.shares, policy.log_shares + SHARE_SPREAD * noise.common[:, :2])
    reward = (action.shares[:, 0] - action.shares[:, 0].mean()).detach()
    total = (policy.log_prob(view, action).sum(1) * reward).mean()
    (slope,) = torch.autograd.grad(total, [policy.log_shares])
    assert slope.tolist() == pytest.approx([1.0, 0.0], abs=0.08)
    (nothing,) = torch.autograd.grad(policy.log_prob(view, action).sum(1).mean(), [policy.log_shares])
    assert nothing.abs().max() < 5 / SHARE_SPREAD / count**0.5
    _, deeper = small(1)
    with torch.no_grad():
        action = policy.draw(deeper, Noise.of([(seed, 0) for seed in range(3)], deeper))
    likely = policy.log_prob(deeper, action).sum()
    assert torch.autograd.grad(likely, [policy.log_shares], allow_unused=True) == (None,)


def test_deployed_and_drawn_decisions_follow_the_shares():
    for layer in range(3):
        policy, view = small(layer)
        assert policy.decide(view).keep.sum(-1).unique().tolist() == [whole_numbers([-0.6, 0.6], 3, 2, layer)]
        action = policy.draw(view, Noise.of([(seed, 1) for seed in range(20)], view))
        wanted = [whole_numbers(shares, 3, 2, layer) for shares in action.shares]
        assert policy.carry_out(view, action).keep.sum(-1).tolist() == [[n] * HEADS for n in wanted]
        assert policy.choices(view, action).tolist() == [[n] * HEADS for n in wanted]


# ---- a ranking of everything ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", [2, "pyramid(beta=3)", "across_heads(layers=depth_shares(points=2))"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_ranking_of_everything_is_of_everything_whatever_the_allocation(allocation, layer):
    """Σ_r π(r) cost(r) ∇log π(r) over all 120 rankings is the gradient of the cost's mean, which is known exactly."""
    _, view = small(layer)
    policy = made(("evict",), 5, budget=2, allocation=allocation)
    whole = policy.with_options(budget=None).requires_grad_(False)
    ranking = torch.tensor(list(permutations(range(5))))[:, None].expand(-1, HEADS, -1).contiguous()
    shares = whole.shares()
    action = Action(ranking=ranking, shares=None if shares is None else shares.expand(len(ranking), -1))
    future = torch.rand(1, HEADS, 5, generator=torch.Generator().manual_seed(0))
    cost = plackett_luce.trace_cost(future.expand(len(ranking), -1, -1), ranking)
    scores = whole.score(view).detach()
    chance = plackett_luce.log_probs(scores.expand_as(ranking), ranking).sum(-1).exp()
    assert chance.sum(0).tolist() == pytest.approx([1.0] * HEADS, abs=1e-5)
    drawn, _ = DrawnRows(view, action, len(ranking)).gradient(whole, chance * cost)
    policy = policy.requires_grad_(True)
    parameters = dict(policy.named_parameters())
    mean = plackett_luce.expected_cost(policy.score(view), future).sum()
    exact = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(exact, parameters.values(), strict=True)]
    wanted = torch.cat([g.flatten() for g in flat]).double()
    found = drawn.double().sum(0).cpu()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_rollouts_where_heads_share_are_refused():
    view = looked_at()
    policy = made(("evict",), 0, budget=9, allocation="across_heads")
    assert policy.decide(view).keep.any()
    with pytest.raises(ConfigError, match="drawn head by head"):
        policy.draw(view, Noise.of([(1, 0)] * view.slots.shape[0], view))
    for allocation, message in (
        ("across_heads", "drawn head by head"), ("threshold", "drawn head by head"),
        ("per_head_shares(layers=3,heads=2)", "drawn head by head"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            made(("evict",), 0, budget=9, allocation=allocation).require_draws()
    with pytest.raises(ConfigError, match="all layers at once"):
        made(("store",), 0, budget=9, allocation="per_head_shares(layers=3,heads=2)").require_draws()
    for allocation in (None, 4, "pyramid", "depth_shares(log_shares=[1, -1])"):
        made(("evict",), 0, budget=9, allocation=allocation).require_draws()
    made(("store",), 0, budget=9, allocation="across_heads").require_draws()
