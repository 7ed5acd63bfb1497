"""Evaluation: the fast way equals the plain way, for every kind of manager, alone and in company."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from evomem.evaluation import EvaluationProtocol, Evaluator, PopulationPolicy
from evomem.evaluation.measurement import EXACT, LOGLIK
from evomem.evaluation.objectives import Attention
from evomem.managers import MemoryManager, build, managers
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

READ, BUDGET = 44, 12
FEATURES = ["keydiff", "value_norm", "key_step", "attention_per_query", "window:8", "mean:3:keydiff", "spectrum:2"]

SPECS = (
    "full",
    "random",
    "protected_random",
    "streaming_llm",
    "knorm",
    "h2o",
    "observed_attention",
    "snapkv(window=8)",
    "pyramidkv(window=8)",
    "tova",
    "keydiff",
    "expected_attention",
    "tri_attention",
    "fifo",
    "lru",
    "lfu",
    "slot_relevance(context=1.0, window=4)",
    "adakv(keydiff)",
    "adakv(snapkv(window=6))",
    "evicted_rows(keydiff, rows=3)",
    "refit(keydiff, probes=4)",
    "namm(scorer=bam, selection=capped)",
    "namm(scorer=bam, selection=threshold)",
    "namm(scorer=bam, selection=dense)",
    "namm(scorer=mlp, selection=capped, hidden=[6])",
    "namm(scorer=linear, selection=threshold)",
    "feature_scorer",
    "feature_scorer(knots=3, hidden=4, allocation=2)",
    "feature_scorer(layers=2, heads=2, knots=1)",
    "retention_gate(hidden=3, layers=2, heads=2)",
    "kv_policy",
    "kv_policy(actions=[store, evict, forget], hidden=3, scale=model)",
    "kv_policy(actions=[store, forget])",
    "keydiff(allocation=per_head_shares(layers=2, heads=2))",
    "snapkv(window=6, allocation=per_head_shares(points=2, heads=2))",
    "keydiff(allocation=probe_shares(power=1))",
    "keydiff(allocation=slots(window=6, total=[0.5, 2]))",
    "snapkv(window=6, allocation=slots(window=8, per_head=per_head_shares(layers=2, heads=2)))",
    "cake(window=8)",
    "lava(window=8)",
)


class Admitting(MemoryManager):
    """Stores only some of what arrives."""

    name = "admitting"

    def __init__(self, **options):
        super().__init__(**options)
        self.weight = nn.Parameter(torch.randn(16))

    def score(self, view):
        return -view.keys.float().norm(dim=-1)

    def admit(self, view):
        return view.values.float() @ self.weight[: view.values.shape[-1]]


class Fading(MemoryManager):
    """Keeps the newest and lets all fade with age."""

    name = "fading"

    def __init__(self, **options):
        super().__init__(**options)
        self.rate = nn.Parameter(torch.rand(()))

    def score(self, view):
        return -view.age.float()

    def decay(self, view):
        return -0.1 * self.rate * view.age.clamp(min=0).float()


class Digest:
    """An exact metric that any difference of the text changes."""

    name, uniform_chance, has_exact = "digest", 0.0, True

    def score(self, sample, output):
        return int.from_bytes(hashlib.sha256(output.encode()).digest()[:6], "big") / 2**48


TASK = Digest()


TOKENIZER = tiny_tokenizer()
WORDS = [w for w in map(TOKENIZER.decode, range(6, 120)) if len(TOKENIZER.encode(w, add_special_tokens=False)) == 1]


def text(seed, count):
    """So many words, a token each."""
    places = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[place] for place in places.tolist())


def make_sample(seed=0, context=READ, question=5, answer=4):
    parts = (text(3 * seed + i, n) for i, n in enumerate((context, question, answer)))
    return Sample(f"words/{seed}", *parts, ("w",), 5)


def randomised(manager, seed):
    """The manager with random parameters, buffers left as they are."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in manager.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    return manager.requires_grad_(False)


def made(spec, seed=0):
    featured = spec.startswith(("feature_scorer", "kv_policy"))
    options = {"features": FEATURES, "sinks": 1, "recent": 2} if featured else {}
    if spec != "full" and "threshold" not in spec and "dense" not in spec:
        options["budget"] = BUDGET
    return randomised(build(spec, **options), seed)


def population():
    """Every kind; those with parameters twice, and two with other budgets."""
    found = [made(spec, seed) for spec in SPECS for seed in range(2 if list(made(spec).parameters()) else 1)]
    found += [randomised(kind(budget=BUDGET), seed) for kind in (Admitting, Fading) for seed in range(2)]
    return [*found, made("keydiff").with_options(budget=0.5), found[-3].with_options(budget=7)]


@pytest.fixture(scope="module")
def llama():
    return LoadedModel("llama", tiny("llama", layers=2), tiny_tokenizer(), "llama")


@pytest.fixture(scope="module")
def gpt2():
    return LoadedModel("gpt2", tiny("gpt2", layers=2), tiny_tokenizer(), "gpt2")


PROTOCOLS = {
    "once": EvaluationProtocol(),
    "once, aware": EvaluationProtocol(mode="query_aware"),
    "streaming": EvaluationProtocol(kind="streaming", every=17),  # 17, 34, and 51 while it answers
    "streaming, aware": EvaluationProtocol(kind="streaming", every=16, mode="query_aware"),  # the last ends the reading
    "never": EvaluationProtocol(kind="streaming", every=64),  # all is shorter than the first turn
    "late": EvaluationProtocol(kind="streaming", every=46),  # the first turn comes in the question
}
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def equal(fast, plain):
    assert fast.loglik == pytest.approx(plain.loglik, abs=1e-5)
    assert fast.exact == plain.exact
    assert fast.slots == pytest.approx(plain.slots, abs=1e-6)
    assert fast.bytes_peak == plain.bytes_peak
    assert fast.bytes_mean == pytest.approx(plain.bytes_mean, rel=1e-12)
    assert fast.sample == plain.sample


def same(one, other):
    """Bit-identical but for time."""
    return [replace(e, seconds=0.0) for e in one] == [replace(e, seconds=0.0) for e in other]


def recorded(cache):
    """Bytes of the observations in a cache, counted here."""
    states = [tensor for layer in cache.layers for tensor in layer.recorder.tensors()]
    return sum(tensor.nbytes for tensor in states)


# ---- fast and plain -------------------------------------------------------------------------------------------------


def test_every_registered_kind_is_here():
    ours = {name for name in managers.names() if managers.get(name).__module__.startswith("evomem.")}
    ours.remove("kvzip")  # reads every context twice: tests/memory/test_repeating.py
    ours.remove("write_gate")  # no KV cache rewrites its slots: tests/memory/explicit/test_feedback_slots.py
    ours.remove("surprise_gate")  # nor learns what it holds: tests/memory/explicit/test_neural_slots.py
    assert {spec.split("(")[0] for spec in SPECS} == ours


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in PROTOCOLS), ("gpt2", "once"), ("gpt2", "streaming, aware")]
)
def test_fast_equals_plain_for_every_kind_in_one_population(request, family, name):
    loaded, protocol = request.getfixturevalue(family), PROTOCOLS[name]
    evaluator, sample, crowd = Evaluator(loaded, protocol), make_sample(), population()
    found = evaluator.evaluate(crowd, sample, TASK, EXACT)
    assert len(found) == len(crowd)
    for manager, fast in zip(crowd, found, strict=True):
        plain = evaluator.evaluate_plainly(manager, sample, TASK, EXACT)
        try:
            equal(fast, plain)
        except AssertionError as error:
            raise AssertionError(f"{manager!r}\n{fast}\n{plain}") from error
    if protocol.every != 64:
        assert len({e.loglik for e in found}) > len(crowd) / 2  # the decisions made a difference
    assert not loaded.model.config._attn_implementation_internal.startswith("evomem")


@pytest.mark.parametrize("protocol", [PROTOCOLS["once"], PROTOCOLS["streaming"]], ids=["once", "streaming"])
def test_alone_in_chunks_or_together_again_and_permuted(llama, protocol):
    crowd, sample, evaluator = population()[4::2], make_sample(1), Evaluator(llama, protocol)
    together = evaluator.evaluate(crowd, sample, TASK, EXACT)
    assert same(evaluator.evaluate(crowd, sample, TASK, EXACT)[1:], together[1:])
    fresh = Evaluator(llama, protocol).evaluate(crowd, sample, TASK, EXACT)
    assert same(fresh, together)
    for size in (1, 5):
        chunks = [evaluator.evaluate(crowd[at : at + size], sample, TASK, EXACT) for at in range(0, len(crowd), size)]
        for one, other in zip(together, (e for chunk in chunks for e in chunk), strict=True):
            assert one.loglik == pytest.approx(other.loglik, abs=1e-6 * max(1, abs(one.loglik)))
            assert (one.exact, one.slots, one.bytes_peak) == (other.exact, other.slots, other.bytes_peak)
    backwards = evaluator.evaluate(crowd[::-1], sample, TASK, EXACT)[::-1]
    for one, other in zip(together, backwards, strict=True):
        equal(one, other)


def test_without_exact_nothing_is_generated_and_the_rest_is_the_same(llama):
    evaluator, sample, crowd = Evaluator(llama), make_sample(), [made("keydiff"), made("full")]
    with_text, without = (evaluator.evaluate(crowd, sample, TASK, wanted) for wanted in (EXACT, LOGLIK))
    for one, other in zip(with_text, without, strict=True):
        assert other.exact is None
        assert one.exact is not None
        assert (one.loglik, one.bytes_mean) == (other.loglik, other.bytes_mean)

    class Likelihood(Digest):
        has_exact = False

    assert evaluator.evaluate(crowd, sample, Likelihood(), EXACT)[0].exact is None
    assert evaluator.evaluate([], sample, TASK) == []
    assert evaluator.evaluate([], sample, TASK, Attention.measurement) == []


@pytest.mark.parametrize("every", [None, 17])
def test_dense_decides_for_one_candidate_whoever_else_is_there(llama, every):
    """The greediest head of the *batch* sets the number of slots; in a population a batch is one candidate."""
    protocol = EvaluationProtocol() if every is None else EvaluationProtocol(kind="streaming", every=every)
    evaluator, sample, spec = Evaluator(llama, protocol), make_sample(2), "namm(scorer=linear, selection=dense)"
    crowd = [made(spec, seed) for seed in range(6)]
    slots = [e.slots for e in evaluator.evaluate(crowd, sample, TASK)]
    assert len(set(slots)) > 2
    assert slots == [evaluator.evaluate([manager], sample, TASK)[0].slots for manager in crowd]


def test_full_is_the_stock_model_and_nothing_beats_its_bytes(llama):
    evaluator, sample = Evaluator(llama), make_sample()
    found = evaluator.evaluate([made("full"), made("knorm"), made("h2o")], sample, TASK)
    tokens = evaluator.tokens(sample)
    fed = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1)
    logits = llama.model(fed).logits[0].log_softmax(-1)
    count = tokens.answer.shape[1]
    expected = [float(logits[-count - 1 + i, tokens.answer[0, i]]) for i in range(count)]
    assert found[0].loglik == pytest.approx(sum(expected) / count, abs=1e-5)
    assert found[0].slots == READ
    # keys, values, slot index: 2 layers, 2 KV heads, 16 numbers each, and one int64
    per_token = 2 * 2 * (2 * 16 * 4 + 8)
    assert found[0].bytes_peak == per_token * (READ + 5 + 4 - 1)
    assert [e.bytes_mean for e in found[1:]] == [per_token * (BUDGET + (5 + 4 - 1) / 2)] * 2


def test_every_row_pays_for_its_own_tensors_only(llama):
    """Decays and observations of others in the batch are not counted (part of the equality, but said plainly)."""
    knorm, fading, h2o = made("knorm"), randomised(Fading(budget=BUDGET), 0), made("h2o")
    for protocol in (PROTOCOLS["once"], PROTOCOLS["streaming"]):
        evaluator = Evaluator(llama, protocol)
        alone = evaluator.evaluate([knorm], make_sample(), TASK)[0]
        found = evaluator.evaluate([fading, knorm, h2o], make_sample(), TASK)
        assert found[1].bytes_peak == alone.bytes_peak
        assert found[0].bytes_peak > alone.bytes_peak
        assert (found[2].bytes_peak > alone.bytes_peak) == (protocol.kind == "streaming")


def test_schedule_is_the_protocols_and_managers_are_left_as_they_were(llama):
    manager = made("knorm").with_options(every=9)
    sample = make_sample()
    for protocol, every in ((PROTOCOLS["once"], None), (PROTOCOLS["streaming"], 17)):
        evaluator = Evaluator(llama, protocol)
        assert evaluator.scheduled(manager).schedule.every == every
        equal(evaluator.evaluate([manager], sample, TASK)[0], evaluator.evaluate_plainly(made("knorm"), sample, TASK))
    assert manager.schedule.every == 9
    with pytest.raises(ValueError, match="schedule"):
        PopulationPolicy([manager, made("knorm")])


def test_greedy_text_ends_at_an_end_token_row_by_row(llama):
    """Two rows of one batch that end at different steps; the text is cut where the row ends."""
    evaluator, sample = Evaluator(llama), replace(make_sample(), max_new_tokens=8)
    crowd = [made(spec) for spec in ("full", "knorm", "keydiff", "random", "streaming_llm")]
    texts = []

    class Keeping(Digest):
        def score(self, sample, output):
            texts.append(output)
            return 0.0

    evaluator.evaluate(crowd, sample, Keeping(), EXACT)
    whole, texts = texts, []
    word = whole[1].split()[3]
    evaluator.end_tokens = {llama.tokenizer.encode(word, add_special_tokens=False)[0]}
    evaluator.evaluate(crowd, sample, Keeping(), EXACT)
    ends = [t.split().index(word) if word in t.split() else len(t.split()) for t in whole]
    assert len(set(ends)) > 1
    assert [t.split() for t in texts] == [t.split()[:end] for t, end in zip(whole, ends, strict=True)]
