"""Where a policy's stores and rates begin, and the four arms of `experiments/forgetting.yaml`."""

import math
from dataclasses import replace

import pytest
import torch

from evomem.managers.learned.kv_policy import KVPolicy
from evomem.managers.stochastic import Noise
from evomem.runs.experiment_file import load_experiment
from evomem.search_space.space import SearchSpace
from tests.managers.test_features import view_of


@pytest.mark.parametrize("odds", [-0.5, 0.5])
@pytest.mark.parametrize("rate", [-2.0, 0.5])
def test_an_untrained_policy_stores_and_forgets_as_its_options_say(odds, rate):
    view = replace(view_of(0, layer=1), fresh=7)
    policy = KVPolicy(
        actions=("evict", "forget", "store"), features=("keydiff", "age"), odds=odds, rate=rate, budget=999
    )
    decision = policy.decide(view)
    stays = view.valid & ((view.age >= 7) | (odds > 0))
    assert 0 < (view.valid & (view.age < 7)).sum() < view.valid.sum()
    assert torch.equal(decision.keep, stays.expand(decision.keep.shape))
    torch.testing.assert_close(decision.decay[view.valid], torch.full((int(view.valid.sum()),), -math.exp(rate)))


def test_with_age_every_slot_fades_by_its_own_age():
    """Deployed, drawn, and in `decay`, which says the same to other code."""
    view = view_of(2, layer=1)
    plain, aged = (
        KVPolicy(actions=("forget",), features=("keydiff", "age"), rate=-1.0, budget=4, fades=fades)
        for fades in ("at_once", "with_age")
    )
    with torch.no_grad():
        for policy in (plain, aged):
            policy.weights.copy_(torch.tensor([0.3, -0.5]).expand(policy.weights.shape))
    action = plain.draw(view, Noise.of([(3, 4)] * view.slots.shape[0], view))
    ages = (view.age / 64).expand(plain.decay(view).shape)[view.valid.expand(plain.decay(view).shape)]
    for what in (
        lambda policy: policy.decay(view),
        lambda policy: policy.decide(view).decay,
        lambda policy: policy.carry_out(view, action).decay,
    ):
        torch.testing.assert_close(what(aged)[view.valid], what(plain)[view.valid] * ages)
        assert (what(aged) <= 0).all()
    torch.testing.assert_close(aged.log_prob(view, action), plain.log_prob(view, action))


def test_the_arms_of_the_experiment_begin_with_the_same_ranking_and_nothing_refused():
    view = replace(view_of(1, layer=1), fresh=9)
    kept, sizes = [], []
    for actions in ("evict", "evict,store", "evict,forget", "evict,store,forget"):
        config = load_experiment("forgetting", [f"space.manager.options.actions=[{actions}]"])
        space = SearchSpace(config.space)
        kept.append(space.decode(space.start).with_options(budget=5).decide(view))
        sizes.append(space.dim)
        assert space.decode(space.start).options.actions == tuple(actions.split(","))
    for decision in kept[1:]:
        assert torch.equal(decision.keep, kept[0].keep)
    assert [decision.decay is not None for decision in kept] == [False, False, True, True]
    assert sizes == [10, 21, 21, 32]
