"""Rollouts: drawn decisions replayed the plain way, gradients without vmap, ratios, rewards between decisions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from evomem.evaluation import Evaluator
from evomem.evaluation.measurement import EXACT, Measurement, Quantity, Step
from evomem.evaluation.rollouts import CLIP, RolloutPolicy, rollouts, sample_number
from evomem.managers import MemoryManager, build
from evomem.managers.stochastic import Noise
from evomem.memory import Decision, LayerView
from evomem.models import LoadedModel
from evomem.testing.models import tiny, tiny_tokenizer
from tests.evaluation.test_evaluation import FEATURES, PROTOCOLS, READ, TASK, make_sample, randomised

SEEDS = [5, 6, 7]
LISTENING = Measurement.of("loglik", Quantity.of("rollout", listens=True))
ONCE, STREAMING = PROTOCOLS["once"], PROTOCOLS["streaming"]
ACTIONS = [("evict",), ("evict", "store", "forget"), ("store", "forget")]
every_protocol = pytest.mark.parametrize("protocol", [ONCE, STREAMING], ids=["once", "streaming"])
every_subset = pytest.mark.parametrize("actions", ACTIONS, ids="+".join)


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


def policy(seed=0, actions=("evict", "store", "forget"), **options):
    wishes = {"features": FEATURES, "budget": 12, "sinks": 1, "recent": 2, "hidden": 2, "actions": actions, **options}
    return randomised(build("kv_policy", **wishes), seed)


class Spy:
    """What every layer was shown and what was decided, in order."""

    def __init__(self, monkeypatch, kind=RolloutPolicy):
        self.seen: list[tuple[LayerView, Decision]] = []
        decide = kind.decide

        def watched(mine, view):
            shown = replace(view, memo={}, **{n: getattr(view, n).clone() for n in ("keys", "values", "slots")},
                            recorded={n: x.clone() for n, x in view.recorded.items()})  # fmt: skip
            decision = decide(mine, view)
            self.seen.append((shown, decision))
            return decision

        monkeypatch.setattr(kind, "decide", watched)

    def row(self, place):
        """Views of one row with the number of the decision, and what was decided about it: kept tokens, decays."""
        numbers, found = Counter(), []
        for view, decision in self.seen:
            one = row_of(view, place)
            decay = None if decision.decay is None else decision.decay[place]
            found.append((numbers[view.layer], one, decision.keep[place], decay))
            numbers[view.layer] += 1
        return found

    def kept(self, place):
        """The tokens that each decision kept, by head, in a form that can be compared."""
        return [(n, v.layer, [v.slots[0, h][keep[h]].tolist() for h in range(len(keep))], None if d is None else
                 torch.where(keep, d, 0.0).sum(-1).tolist()) for n, v, keep, d in self.row(place)]  # fmt: skip


def row_of(view, place):
    if view.slots.shape[0] == 1:
        return replace(view, memo={})

    def cut(x):
        return x[place : place + 1]

    return replace(view, keys=cut(view.keys), values=cut(view.values), slots=cut(view.slots), start=cut(view.start),
                   recorded={n: cut(x) for n, x in view.recorded.items()}, memo={})  # fmt: skip


class Replay(MemoryManager):
    """Decides by a script: which tokens stay, and how they fade."""

    name = "replay"
    script: dict

    @property
    def observes(self):
        return frozenset()

    def score(self, view):
        raise AssertionError

    def decide(self, view):
        number = self.made.get(view.layer, 0)
        self.made[view.layer] = number + 1
        tokens, decays = self.script[number, view.layer]
        keep, decay = torch.zeros(view.slots.shape, dtype=torch.bool), torch.zeros(view.slots.shape)
        for h, row in enumerate(view.slots[0].tolist()):
            for slot, token in enumerate(row):
                keep[0, h, slot] = token in tokens[h]
                decay[0, h, slot] = decays[h].get(token, 0.0)
        return Decision(keep & view.valid, decay if any(decays) else None)


def replay(rows, every):
    manager = Replay(every=every)
    manager.script, manager.made = {}, {}
    for number, view, keep, decay in rows:
        slots = view.slots[0].tolist()
        tokens = [{t for t, yes in zip(slots[h], keep[h].tolist(), strict=True) if yes} for h in range(len(slots))]
        decays = [dict(zip(slots[h], [] if decay is None else decay[h].tolist(), strict=decay is not None))
                  for h in range(len(slots))]  # fmt: skip
        manager.script[number, view.layer] = (tokens, decays)
    return manager


@every_protocol
@every_subset
def test_a_rollout_is_what_its_decisions_replayed_plainly_are(llama, protocol, actions, monkeypatch):
    spy, evaluator, sample = Spy(monkeypatch), Evaluator(llama, protocol), make_sample()
    found = rollouts(evaluator, policy(1, actions), sample, TASK, SEEDS)
    every = None if protocol is ONCE else protocol.every
    assert len(spy.seen) == 2 * (1 if protocol is ONCE else 3)  # at 17, 34, and 51 while it answers
    for place, one in enumerate(found):
        plain = evaluator.evaluate_plainly(replay(spy.row(place), every), sample, TASK)
        assert one.loglik == pytest.approx(plain.loglik, abs=1e-5)
        assert one.slots == pytest.approx(plain.slots)
        assert one.bytes_mean <= plain.bytes_mean + 1e-9 or "forget" in actions or protocol is STREAMING
        assert one.sample == sample.id
    assert len({one.loglik for one in found}) == len(SEEDS)
    if protocol is STREAMING:  # what was kept once is evicted later
        (_, _, before, _), (_, later, _, _) = (r for r in spy.row(0) if r[1].layer == 0 and r[0] < 2)
        assert int(before.sum()) < before.numel()
        assert later.slots.shape[-1] < 34


@every_protocol
@every_subset
def test_gradients_are_autograds_one_layer_and_row_at_a_time(llama, protocol, actions, monkeypatch):
    spy, evaluator, sample = Spy(monkeypatch), Evaluator(llama, protocol), make_sample()
    manager, reference = policy(2, actions), policy(3, actions)
    found = rollouts(evaluator, manager, sample, TASK, SEEDS, reference=reference)
    manager.requires_grad_(True)
    for place, seed in enumerate(SEEDS):
        steps = found[place].steps
        sums = [[torch.zeros(()), 0.0, 0.0] for _ in steps]
        for number, view, keep, _ in spy.row(place):
            noise = Noise.of([(seed, sample_number(sample.id), number)], view)
            with torch.no_grad():
                action = manager.draw(view, noise)
            assert torch.equal(manager.carry_out(view, action).keep[0], keep)
            sums[number][0] = sums[number][0] + manager.log_prob(view, action).sum()
            sums[number][1] += float(reference.log_prob(view, action).sum().detach())
            sums[number][2] += int(manager.choices(view, action).sum())
        for step, (log_prob, other, choices) in zip(steps, sums, strict=True):
            parts = torch.autograd.grad(log_prob, list(manager.parameters()))
            expected = torch.cat([part.flatten() for part in parts])
            mine = torch.from_numpy(Step.numbers(step.gradient)).float()
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
            assert step.log_prob == pytest.approx(float(log_prob.detach()), rel=1e-5)
            assert step.reference == pytest.approx(other, rel=1e-5)
            assert step.choices == choices
            assert (step.lower, step.clipped, step.ascent, step.reward) == (b"", 0.0, False, 0.0)


def plain(evaluations):
    return [replace(one, seconds=0.0, tokens=0) for one in evaluations]


@every_protocol
def test_a_seed_is_a_rollout_to_the_bit_whoever_else_is_there(llama, protocol, monkeypatch):
    manager, sample, spy = policy(4), make_sample(2), Spy(monkeypatch)
    one, again = (rollouts(Evaluator(llama, protocol), manager, sample, TASK, SEEDS, EXACT) for _ in range(2))
    assert plain(one) == plain(again)
    together = spy.kept(1)[: len(spy.seen) // 2]
    spy.seen.clear()
    (alone,) = rollouts(Evaluator(llama, protocol), manager, sample, TASK, SEEDS[1:2], EXACT)
    mine = [(n, layer, tokens) for n, layer, tokens, _ in spy.kept(0)]
    assert mine == [(n, layer, tokens) for n, layer, tokens, _ in together]
    assert alone.loglik == pytest.approx(one[1].loglik, abs=1e-5)
    assert alone.exact == one[1].exact
    assert alone.bytes_mean == pytest.approx(one[1].bytes_mean, rel=1e-9)
    assert [s.log_prob for s in alone.steps] == pytest.approx([s.log_prob for s in one[1].steps], rel=1e-5)
    spy.seen.clear()
    rollouts(Evaluator(llama, protocol), manager, replace(sample, id="words/else"), TASK, SEEDS[1:2])
    assert mine != [(n, layer, tokens) for n, layer, tokens, _ in spy.kept(0)]  # other draws on other samples


@every_protocol
def test_ratios_of_a_policy_to_itself_are_one(llama, protocol):
    manager, sample = policy(5), make_sample()
    free = rollouts(Evaluator(llama, protocol), manager, sample, TASK, SEEDS)
    clipped = rollouts(Evaluator(llama, protocol), manager, sample, TASK, SEEDS, behaviour=policy(5))
    for one, other in zip(free, clipped, strict=True):
        assert one.loglik == other.loglik
        for mine, theirs in zip(one.steps, other.steps, strict=True):
            assert theirs.clipped == 0
            assert Step.numbers(theirs.gradient) == pytest.approx(Step.numbers(mine.gradient), rel=1e-4, abs=1e-3)
            assert theirs.lower == theirs.gradient


@every_protocol
def test_moved_policies_follow_the_clipped_surrogate(llama, protocol, monkeypatch):
    """Autograd of Σ min(r A, clip(r) A) over the choices of the views; those past the clip give nothing."""
    behaviour, manager = policy(6), policy(6)
    g, sample = torch.Generator().manual_seed(0), make_sample()
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape, generator=g))
    spy = Spy(monkeypatch)
    found = rollouts(Evaluator(llama, protocol), manager, sample, TASK, SEEDS, behaviour=behaviour)
    manager.requires_grad_(True)
    sides = set()
    for place, seed in enumerate(SEEDS):
        for number, step in enumerate(found[place].steps):
            logs, choices = [], 0
            for at, view, _, _ in spy.row(place):
                if at == number:
                    noise = Noise.of([(seed, sample_number(sample.id), number)], view)
                    action = behaviour.draw(view, noise)
                    logs.append((manager.log_probs(view, action) - behaviour.log_probs(view, action)).flatten())
                    choices += int(manager.choices(view, action).sum())
            ratio = torch.cat(logs).exp()
            for advantage, packed in ((1.0, step.gradient), (-1.0, step.lower)):
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum()
                parts = torch.autograd.grad(surrogate, list(manager.parameters()), retain_graph=True)
                expected = torch.cat([part.flatten() for part in parts]).double().numpy()
                mine = advantage * Step.numbers(packed)
                assert mine == pytest.approx(expected, rel=1e-2, abs=3e-3 * abs(expected).max() + 1e-6)
            out = (ratio > 1 + CLIP) | (ratio < 1 - CLIP)
            assert step.clipped == pytest.approx(int(out.sum()) / choices)
            sides |= {
                name for name, side in (("high", ratio > 1 + CLIP), ("low", ratio < 1 - CLIP)) if bool(side.any())
            }
            sides |= {"inside"} if not bool(out.all()) else set()
    assert sides == {"high", "low", "inside"}


def test_further_passes_read_and_answer_nothing_and_see_the_same(llama):
    behaviour, newer, sample = policy(7), policy(8), make_sample()
    evaluator = Evaluator(llama)
    first = rollouts(evaluator, behaviour, sample, TASK, SEEDS, EXACT)
    again = rollouts(evaluator, newer, sample, TASK, SEEDS, EXACT, behaviour=behaviour)
    fresh = rollouts(Evaluator(llama), newer, sample, TASK, SEEDS, EXACT, behaviour=behaviour)
    assert sum(one.tokens for one in again) == 0 < sum(one.tokens for one in fresh)
    assert plain(again) == plain(fresh)
    assert [one.loglik for one in again] == [one.loglik for one in first]
    assert [one.exact for one in again] == [one.exact for one in first]
    assert sum(one.tokens for one in rollouts(evaluator, newer, sample, TASK, SEEDS, EXACT)) > 0


def test_steps_are_kept_to_the_bit(llama):
    found = rollouts(
        Evaluator(llama, STREAMING),
        policy(9),
        make_sample(),
        TASK,
        SEEDS,
        LISTENING,
        behaviour=policy(10),
        reference=policy(11),
    )
    steps = [step for one in found for step in one.steps]
    assert all(step.lower and step.reward and step.reference for step in steps[:2])
    for step in steps:
        assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step
    data = json.loads(json.dumps(found[0].to_json()))
    assert tuple(Step.from_json(step) for step in data["steps"]) == found[0].steps


def test_what_is_read_after_a_decision_is_its_reward(llama, monkeypatch):
    """All logits of one plain pass with the decisions replayed; tokens whose logits come from before do not count."""
    spy, evaluator, sample = Spy(monkeypatch), Evaluator(llama, STREAMING), make_sample()
    found = rollouts(evaluator, policy(12), sample, TASK, SEEDS, LISTENING)
    read, every = evaluator.tokens(sample).read, STREAMING.every
    silent = rollouts(evaluator, policy(12), sample, TASK, SEEDS)
    for place, one in enumerate(found):
        assert one.loglik == pytest.approx(silent[place].loglik, abs=1e-6)
        manager = replay(spy.row(place)[:6], every)
        with manager.attach(llama.model) as cache, torch.no_grad(), cache.reading():
            logits = llama.model(input_ids=read, past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
        for number, step in enumerate(one.steps):
            begin, end = every * (number + 1), min(every * (number + 2), READ)
            heard = [float(logits[t - 1, read[0, t]]) for t in range(begin + 1, end)]
            expected = sum(heard) / len(heard) if heard else 0.0
            assert step.reward == pytest.approx(expected, abs=1e-5)
        assert [bool(step.reward) for step in one.steps] == [True, True, False]


# ---- nothing that comes later changes a decision ---------------------------------------------------------------------


def test_later_tokens_never_change_a_decision_drawn_or_deployed(llama, monkeypatch):
    from evomem.evaluation import PopulationPolicy

    one, other = make_sample(3), make_sample(4)
    words, others = one.context.split(), other.context.split()
    assert len(words) == READ
    later = replace(one, context=" ".join(words[:36] + others[36:]), question=other.question, answer=other.answer)
    asked = replace(one, question=other.question, answer=other.answer)
    for kind, run in (
        (RolloutPolicy, lambda e, s: rollouts(e, policy(13), s, TASK, SEEDS)),
        (PopulationPolicy, lambda e, s: e.evaluate([policy(seed) for seed in SEEDS], s, TASK)),
    ):
        spy = Spy(monkeypatch, kind)

        def decisions(protocol, sample, spy=spy, run=run):
            spy.seen.clear()
            found = run(Evaluator(llama, protocol), sample)
            return [spy.kept(place) for place in range(len(SEEDS))], [one.loglik for one in found]

        for protocol, sample, before in ((ONCE, asked, 1), (STREAMING, later, 2)):
            (mine, likely), (theirs, unlikely) = decisions(protocol, one), decisions(protocol, sample)
            assert likely != unlikely
            for row, same in zip(mine, theirs, strict=True):
                early, same_early = ([d for d in rows if d[0] < before] for rows in (row, same))
                assert early == same_early
                assert len(early) == 2 * before
            if protocol is STREAMING:
                assert mine != theirs  # what comes before a decision does
