"""Managers on streams: a cache of Python says the same, alone or in a population; what does not fit is refused."""

from __future__ import annotations

import math

import pytest
import torch

import evomem
from evomem.cli.commands import allocate
from evomem.errors import ConfigError, ModelError
from evomem.evaluation import EXACT, Evaluator, Measurement
from evomem.evaluation import streams as streams_module
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.measurement import HEAD_MEMORY, EvaluationProtocol, Step
from evomem.evaluation.measures import Draws
from evomem.evaluation.stream_requests import DOUBT
from evomem.evaluation.streams import StreamEvaluator, evaluator_of
from evomem.managers import build
from evomem.models import LoadedModel
from evomem.models.architectures.pair_memory import PairMemoryConfig, PairMemoryModel, pair_memory_tokenizer
from evomem.models.sharing import assemble, dismantle
from evomem.tasks import build as build_task
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support import slow_stream

BUDGET = 8
ORDERS = {"-recency": lambda stored, used, reads: used, "-age": lambda stored, used, reads: stored}
TOKENIZER = pair_memory_tokenizer()


def memory(**options):
    """Return a memory that reads streams."""
    torch.manual_seed(0)
    return LoadedModel("pairs", PairMemoryModel(PairMemoryConfig(**options)).eval(), TOKENIZER, "pairs")


def evaluator(every=1, **options):
    return evaluator_of(memory(**options), EvaluationProtocol(kind="streaming", every=every))


def scorer(**weights):
    """Return a scorer with weights by the names of features."""
    manager = build("feature_scorer", features=list(weights), knots=1, sinks=0, recent=1, budget=BUDGET)
    with torch.no_grad():
        manager.weights[:] = torch.tensor(list(weights.values()))
    return manager


def sample_of(task):
    return task.samples("train", 1, 0)[0]


ZIPF = build_task("zipf:length=120,keys=40,dim=8", TOKENIZER)
FILLED = build_task("zipf:length=120,keys=40,dim=8,filler=0.3,filler_keys=5", TOKENIZER)


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("task", [ZIPF, FILLED], ids=["zipf", "filler"])
def test_hit_rates_are_those_of_a_cache(task, every):
    sample = sample_of(task)
    stream = task.stream(sample)
    managers = [build("full"), scorer(recency=-1.0), scorer(age=-1.0)]
    measured = evaluator(every).evaluate(managers, sample, task, EXACT.also(HEAD_MEMORY))
    orders = [None, ORDERS["-recency"], ORDERS["-age"]]
    for evaluation, order in zip(measured, orders, strict=True):
        right = slow_stream.answered(stream, BUDGET, every, order)
        assert evaluation.exact == pytest.approx(slow_stream.exact(stream, right), abs=1e-12)
        wanted = slow_stream.loglik(stream, right, sample.meta["items"], DOUBT)
        assert evaluation.loglik == pytest.approx(wanted, abs=1e-6)
        words = [word if answer else "-" for word, answer in zip(map(str, stream.values), right, strict=True)]
        output = " ".join(word for word, read in zip(words, stream.reads, strict=True) if read)
        assert evaluation.exact == pytest.approx(task.score(sample, output), abs=1e-12)
    assert measured[1].table("head_slots") == ((float(BUDGET),),)
    assert measured[0].exact > measured[1].exact


def test_candidates_are_measured_as_if_each_were_alone():
    task = build_task("zipf:length=50,keys=30,dim=8", TOKENIZER)
    sample, one = sample_of(task), evaluator()
    draw = torch.Generator().manual_seed(0)
    names = ("recency", "frequency", "frequency_decayed:16", "relevance:4", "novelty", "surprise")
    managers = [scorer(**dict(zip(names, torch.randn(6, generator=draw).tolist(), strict=True))) for _ in range(3)]
    managers += [build("random", budget=BUDGET), build("keydiff", budget=2 * BUDGET), build("h2o", budget=BUDGET)]
    together = one.evaluate(managers, sample, task, EXACT)
    for manager, evaluation in zip(managers, together, strict=True):
        alone = one.evaluate_plainly(manager, sample, task, EXACT)
        assert alone.values == evaluation.values
        assert (alone.slots, alone.bytes_peak, alone.bytes_mean) == (
            evaluation.slots, evaluation.bytes_peak, evaluation.bytes_mean,
        )  # fmt: skip
    assert len({evaluation.exact for evaluation in together}) > 3


def test_a_new_value_is_wanted_and_the_old_one_misleads():
    task = build_task("key_overwrites:length=80,keys=12,dim=8", TOKENIZER)
    sample = sample_of(task)
    full = build("full")
    exact = evaluator().evaluate([full], sample, task, EXACT)[0]
    assert exact.exact == 1.0
    assert exact.loglik == pytest.approx(math.log(1 - DOUBT + DOUBT / 12), abs=1e-6)
    # A softmax mixes all values that a key ever had; it is never surer than the newest of them.
    soft = evaluator(beta=50.0).evaluate([full], sample, task, EXACT)[0]
    assert soft.exact < 1.0
    assert soft.loglik < exact.loglik


def test_a_softmax_reads_by_blurred_keys():
    task = build_task("noisy_recall:length=60,keys=8,dim=32,noise=0.3", TOKENIZER)
    sample, full = sample_of(task), build("full")
    by_beta = [evaluator(beta=beta).evaluate([full], sample, task, EXACT)[0] for beta in (0.0, 4.0, 16.0)]
    assert by_beta[2].exact == 1.0
    assert by_beta[0].loglik < by_beta[1].loglik < by_beta[2].loglik


def test_sets_have_slots_of_their_own_and_share_a_budget():
    sample = sample_of(ZIPF)
    equal = scorer(recency=-1.0).with_options(budget=3)
    shared = equal.with_options(allocation="across_heads")
    measured = evaluator(num_attention_heads=4).evaluate([equal, shared], sample, ZIPF, EXACT.also(HEAD_MEMORY))
    slots, slots_shared = (evaluation.table("head_slots")[0] for evaluation in measured)
    assert max(slots) == 3.0
    assert len(slots) == 4
    assert sum(slots_shared) >= sum(slots)
    assert max(slots_shared) > 3.0


def test_a_memory_that_was_sent_to_a_worker_measures_the_same():
    loaded, sample = memory(beta=3.0), sample_of(ZIPF)
    protocol = EvaluationProtocol(kind="streaming", every=2)
    there = evaluator_of(assemble(dismantle(loaded)), protocol).evaluate([scorer(recency=-1.0)], sample, ZIPF, EXACT)
    here = evaluator_of(loaded, protocol).evaluate([scorer(recency=-1.0)], sample, ZIPF, EXACT)
    assert here[0].values == there[0].values


def test_shipped_memories_load():
    for name, beta in (("pair-memory", None), ("pair-memory-soft", 16.0)):
        loaded = evomem.load_model(name)
        assert loaded.model.config.beta == beta
        with pytest.raises(ModelError, match="reads streams of requests"):
            loaded.model(torch.zeros(1, 1, dtype=torch.int64))


def test_what_does_not_fit_is_refused():
    sample, one = sample_of(ZIPF), evaluator()
    assert isinstance(one, StreamEvaluator)
    with pytest.raises(ConfigError, match=r"--protocol streaming:1"):
        evaluator_of(memory(), EvaluationProtocol())
    with pytest.raises(ConfigError, match="'query_statistics' needs queries at positions, which a pair memory"):
        one.evaluate([build("expected_attention", budget=BUDGET)], sample, ZIPF)
    with pytest.raises(ConfigError, match=r"measurement head_attention.*exact"):
        one.evaluate([build("full")], sample, ZIPF, Measurement.of("head_attention"))
    with pytest.raises(ConfigError, match="looks at what attention heads do"):
        one.evaluate([build("keydiff", budget=BUDGET, allocation="probe_shares")], sample, ZIPF)
    text = build_task("passkey:length=100", tiny_tokenizer())
    with pytest.raises(ConfigError, match="is a text"):
        one.evaluate([build("full")], text.samples("train", 1, 0)[0], text)
    language = Evaluator(LoadedModel("tiny", tiny("llama", layers=1), tiny_tokenizer(), "tiny"))
    with pytest.raises(ConfigError, match="pair-memory"):
        language.evaluate([build("full")], sample, ZIPF)


def test_rollouts_are_drawn_and_their_gradients_are_those_of_any_memory():
    sample, one = sample_of(ZIPF), evaluator(every=6)
    policy = build("kv_policy", features=["recency", "frequency"], budget=BUDGET)
    measurement = EXACT.also(Measurement.of("rollout"))
    drawn = one.evaluate([policy] * 4, sample, ZIPF, measurement, Draws([1, 2, 3, 3]))
    assert drawn[2].values == drawn[3].values
    assert len({evaluation.exact for evaluation in drawn}) > 1
    for evaluation in drawn:
        assert len(evaluation.steps) == 120 // 6
        gradients = torch.stack([torch.from_numpy(Step.numbers(step.gradient)) for step in evaluation.steps])
        assert gradients.shape[1] == sum(parameter.numel() for parameter in policy.parameters())
        assert gradients.abs().sum() > 0
    alone = one.evaluate([policy], sample, ZIPF, measurement, Draws([2]))[0]
    assert alone.values == drawn[1].values
    for mine, theirs in zip(alone.steps, drawn[1].steps, strict=True):
        assert mine.choices == theirs.choices
        for name in ("gradient", "lower"):
            numbers = (Step.numbers(getattr(step, name)) for step in (mine, theirs))
            torch.testing.assert_close(*map(torch.from_numpy, numbers), rtol=1e-3, atol=1e-4)


def test_a_field_of_all_leaves_out_what_a_memory_has_not(caplog):
    one, task = evaluator(every=5), build_task("zipf:length=20,keys=10,dim=4,topics=2", TOKENIZER)
    members = [NamedManager("lru", scorer(recency=-1.0))]
    compared = compare(members, [Scenario("pairs", "zipf", one, task)], samples=1, budgets=[3])
    assert "expected_attention is left out of the field: observation 'query_statistics'" in caplog.text
    assert "snapkv is left out of the field: observation 'window_" in caplog.text
    assert {"keydiff", "h2o", "full", "lru"} <= {row.manager for row in compared.rows}
    assert not {"expected_attention", "snapkv"} & {row.manager for row in compared.rows}


def test_a_scorer_of_streams_decides_about_a_kv_cache_as_it_is(tmp_path):
    names = ("recency", "frequency", "frequency_decayed:16", "relevance:4", "novelty", "age")
    scorer_of_streams = scorer(**dict.fromkeys(names, 0.5))
    scorer_of_streams.save_pretrained(tmp_path / "plugin")
    manager, model = evomem.load(tmp_path / "plugin"), tiny("llama", layers=2)
    ids = torch.randint(8, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    with manager.attach(model) as cache:
        model(ids, past_key_values=cache)
        assert [held.tolist() for held in cache.slots_held()] == [[[BUDGET, BUDGET]] * 2] * 2
    with pytest.raises(ConfigError, match="'surprise' needs predictions"), scorer(surprise=1.0).attach(model) as cache:
        model(ids, past_key_values=cache)


def test_streams_side_by_side_are_measured_as_if_each_were_alone(monkeypatch):
    task, one = build_task("zipf:length=60,keys=30,dim=8,topics=4,fewest_keys=15", TOKENIZER), evaluator(2)
    samples = task.samples("train", 5, 0)
    managers = [build("full"), scorer(recency=-1.0, novelty=0.3), scorer(recency=-0.4, novelty=1.0)]
    monkeypatch.setattr(streams_module, "ROWS", 6)  # two streams at a time, the last one alone
    assert one.samples_at_once(len(managers)) == 2
    together = one.evaluate_together(managers, samples, task, EXACT.also(HEAD_MEMORY))
    assert len({evaluations[1].exact for evaluations in together}) > 2
    for sample, evaluations in zip(samples, together, strict=True):
        alone = one.evaluate(managers, sample, task, EXACT.also(HEAD_MEMORY))
        for mine, theirs in zip(evaluations, alone, strict=True):
            assert mine.sample == sample.id
            assert (mine.values, mine.slots, mine.bytes_mean) == (theirs.values, theirs.slots, theirs.bytes_mean)


def test_a_comparison_goes_on_in_the_same_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "ROWS", 4)
    one, task = evaluator(5), build_task("zipf:length=20,keys=10,dim=4,topics=2", TOKENIZER)
    blocks, measure = [], StreamEvaluator.on_samples

    def counted(self, managers, samples, *arguments):
        blocks.append(len(samples))
        return measure(self, managers, samples, *arguments)

    monkeypatch.setattr(StreamEvaluator, "on_samples", counted)
    places, file = [Scenario("pairs", "zipf", one, task)], tmp_path / "samples.jsonl"

    def rows():
        members = [NamedManager("a", scorer(recency=-1.0)), NamedManager("b", scorer(age=-1.0))]
        return compare(members, places, samples=4, budgets=[3], against=[], keep=file).rows

    whole = rows()
    assert set(blocks) == {2}
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:4]) + "\n")  # killed in the middle of the second block
    count = len(blocks)
    assert [(row.manager, row.score) for row in rows()] == [(row.manager, row.score) for row in whole]
    assert blocks[count:] == blocks[: len(blocks) - count]


def test_a_decision_is_credited_with_the_reads_after_it():
    task, one = build_task("zipf:length=30,keys=12,dim=8,topics=2", TOKENIZER), evaluator(4)
    sample, policy = sample_of(task), build("kv_policy", features=["recency"], budget=4, draws="evicted")
    measurement = EXACT.also(Measurement.of("rollout")).with_options("rollout", listens=True)
    drawn = one.evaluate([policy] * 8, sample, task, measurement, Draws(list(range(8))))
    for rollout in drawn:
        assert len(rollout.steps) == 7
        rewards = [step.reward * 4 for step in rollout.steps]  # every request of this stream reads
        rewards[-1] /= 2  # after the last decision there are two
        assert sum(rewards) <= rollout.exact * 30 + 1e-9
        assert sum(rewards) >= rollout.exact * 30 - 4
        assert all(reward == pytest.approx(round(reward)) for reward in rewards)
    assert len({rollout.exact for rollout in drawn}) > 1


def test_a_manager_that_lets_slots_fade_is_refused_where_that_changes_nothing():
    fading = build("kv_policy(actions=[evict, forget], features=[age])", budget=BUDGET)
    evicting = build("adakv(kv_policy(features=[age]))", budget=BUDGET)
    assert [one.forgets for one in (fading, evicting, build("lru"))] == [True, False, False]
    with pytest.raises(ConfigError, match=r"'kv_policy' lets slots fade, and model .* is read by names"):
        evaluator(every=5).evaluate([evicting, fading], sample_of(ZIPF), ZIPF)


@pytest.mark.parametrize("every", [120, 5000])
def test_a_stream_that_ends_before_a_decision_matters_is_refused(every):
    """Every manager would be measured as the full memory, and a search would look for nothing."""
    with pytest.raises(ConfigError, match=r"120 requests ends before a decision has mattered.*streaming:60"):
        evaluator(every).evaluate([scorer(recency=-1.0)], sample_of(ZIPF), ZIPF, EXACT)


def test_many_requests_between_decisions_are_fed_in_pieces(monkeypatch):
    """All at once they would take memory that grows with the square of their number."""
    whole = evaluator(50, beta=4.0).evaluate([build("lru", budget=BUDGET)], sample_of(ZIPF), ZIPF, EXACT)[0]
    monkeypatch.setattr(streams_module, "PIECE", 7)
    parts = evaluator(50, beta=4.0).evaluate([build("lru", budget=BUDGET)], sample_of(ZIPF), ZIPF, EXACT)[0]
    assert parts.exact == whole.exact
    assert parts.loglik == pytest.approx(whole.loglik, abs=1e-6)
    assert (parts.slots, parts.bytes_mean, parts.bytes_peak) == (whole.slots, whole.bytes_mean, whole.bytes_peak)


def test_curves_of_heads_are_not_for_memories(tmp_path):
    with pytest.raises(ConfigError, match=r"'pair-memory' has a memory of its own.*across_heads"):
        allocate.allocate(
            "lru", "pair-memory", "zipf:length=60,keys=12,topics=2", tmp_path / "out", samples=1, seed=0,
            split="train", mode="query_agnostic", points=4, budget=None, shares=False, traces=[],
        )  # fmt: skip
