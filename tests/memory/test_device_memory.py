"""Memory: how many candidates are a batch is chosen once and kept; where memory ends it is halved, and that is told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomem.devices import CPU, free_bytes, memory_that_ended
from evomem.errors import OutOfMemoryError
from evomem.evaluation import Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.measurement import LOGLIK
from evomem.evaluation.store import PrefillStore, room_for_readings
from evomem.runs import Bench, open_run, search
from evomem.runs.chunks import Chunk, Chunks, chunks_of
from evomem.runs.warm_start import replay
from evomem.testing.pretend import PretendDevices
from tests.cli.test_cli import error, run
from tests.evaluation.test_evaluation import TASK, made, make_sample
from tests.memory.test_devices import Described, loaded
from tests.runs.test_block_search import Words
from tests.support.synthetic_search import ToyEvaluator, experiment, factory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def events(folder, name="chunk"):
    return [r for r in open_run(folder).records() if r["kind"] == "event" and r["event"] == name]


def sizes(folder):
    return [(event["chunk"], event["phase"], event["generation"]) for event in events(folder)]


def trained(folder):
    """How many candidates every unit of the search had."""
    records = open_run(folder).records()
    return [len(r["evaluations"]) for r in records if r["kind"] == "unit" and r["phase"] == "train"]


# ---- where memory ends ----------------------------------------------------------------------------------------------


class Shaped(ToyEvaluator):
    """Its numbers depend on the batch's shape, as real ones do in their last digits; larger batches fail after a while.

    limits : (calls, candidates): from that call on, so many candidates fit.
    """

    def __init__(self, *limits, error=FULL, stop=None):
        super().__init__()
        self.limits, self.error, self.stop = limits, error, stop

    def evaluate(self, candidates, sample, task, measurement=LOGLIK):
        fits = min((most for after, most in self.limits if len(self.calls) >= after), default=99)
        if self.stop is not None and len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        if len(candidates) > fits:
            self.calls.append((sample.id, len(candidates), "exact" in measurement))
            raise self.error
        found = super().evaluate(candidates, sample, task, measurement)
        return [replace(one, values={"loglik": one.loglik + 1e-3 * len(candidates)}) for one in found]


def outcome(folder):
    """What a run found, and by which evaluations."""
    run = open_run(folder)
    units = {
        (r["key"], r["candidates"]): [e["loglik"] for e in r["evaluations"]]
        for r in run.records()
        if r["kind"] == "unit"
    }
    return run.winner_vector.tolist(), [g.fitness for g in run.generations()], units


def test_a_generation_that_ends_memory_is_measured_anew_in_halves_and_so_are_those_after_it(tmp_path, caplog):
    evaluator = Shaped((40, 2))
    search(experiment("generations=4"), tmp_path / "run", factory(evaluator))
    (first,) = sizes(tmp_path / "run")  # explicit, so the choice itself is no event
    assert first[0] == 2
    assert first[1] == "train"
    assert "2 candidates are one batch" in caplog.text
    assert "a device has no memory left" in caplog.text
    shapes: dict[int, set[int]] = {}
    for record in open_run(tmp_path / "run").records():
        if record["kind"] == "unit" and record["phase"] == "train":
            shapes.setdefault(record["generation"], set()).add(len(record["evaluations"]))
    generation = first[2]
    assert 0 < generation < 3
    assert [shapes[g] for g in range(4) if g != generation] == [{4, 2}] * generation + [{2}] * (3 - generation)
    # A generation is told by units of one shape, and another shape would have been seen.
    search(experiment("generations=4", "chunk=2"), tmp_path / "two", factory(Shaped()))
    told, two = (open_run(tmp_path / name).generations() for name in ("run", "two"))
    assert told[0].fitness != two[0].fitness


def test_a_run_whose_memory_ended_goes_on_to_the_bit(tmp_path):
    config = experiment("generations=3")
    search(config, tmp_path / "whole", factory(Shaped((40, 2))))
    for stop in (55, 95):
        cut = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            search(config, cut, factory(Shaped((40, 2), stop=stop)))
        # Wherever it goes on, there is room: the size is the journal's.
        search(config, cut, factory(Shaped()), resume=True)
        assert outcome(cut)[:2] == outcome(tmp_path / "whole")[:2]
        assert sizes(cut) == sizes(tmp_path / "whole")
        assert len(list(replay(open_run(cut)))) == 3


HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize(
    ("error", "memory", "words"),
    [(FULL, "device", "smaller type"), (HOST, "host", "more memory")],
    ids=["device", "host"],
)
def test_where_one_candidate_does_not_fit_the_error_names_whose_memory_and_the_cure(error, memory, words, tmp_path):
    with pytest.raises(OutOfMemoryError, match=words) as caught:
        search(experiment("generations=2"), tmp_path, factory(Shaped((10, 0), error=error)))
    assert caught.value.memory == memory
    assert "One candidate alone does not fit" in str(caught.value)
    assert [size for size, *_ in sizes(tmp_path)] == [2, 1]
    done = search(experiment("generations=2"), tmp_path, factory(Shaped()), resume=True)  # more memory, or less in it
    assert done.generations == 2


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (FULL, "device"),
        (MemoryError(), "host"),
        (HOST, "host"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "device"),
        (RuntimeError("OutOfMemoryError: from a worker, whose error lost its type"), "device"),
        (RuntimeError("shapes do not fit"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_whose_memory_ended_is_told_by_the_error(error, memory):
    assert memory_that_ended(error) == memory


def test_sizes_count_from_where_they_were_halved():
    chunks = Chunks([Chunk(32)])
    chunks.halve("train", 3, 32, OutOfMemoryError("", "device"))
    chunks.halve("sealed", None, 10, OutOfMemoryError("", "device"))
    chunks.halve("oracle", 5, 32, OutOfMemoryError("", "device"))
    assert [chunks.at("train", g) for g in (0, 2, 3, 5, 6)] == [32, 32, 16, 16, 8]
    assert chunks.at("oracle", 5) == 8
    assert chunks.at("select", None) == 8
    assert chunks.at("sealed", None) == 5
    lines = [{"kind": "event", "event": "chunk", "chunk": c.size, "phase": c.phase, "generation": c.generation}
             for c in chunks._known]  # fmt: skip
    again = chunks_of([{"kind": "unit"}, *lines], None)
    places = [
        ("train", 2),
        ("train", 3),
        ("oracle", 4),
        ("oracle", 5),
        ("train", 6),
        ("select", None),
        ("sealed", None),
    ]
    assert [again.at(*place) for place in places] == [chunks.at(*place) for place in places]


def test_a_comparison_whose_memory_ends_takes_smaller_batches(caplog):
    class Small(Evaluator):
        def on_samples(self, managers, *arguments, **options):
            if len(managers) > 2:
                raise FULL
            return super().on_samples(managers, *arguments, **options)

    found = []
    for kind in (Evaluator, Small):
        places = [Scenario("llama", "words", kind(loaded()), Described())]
        subject = NamedManager("mine", made("keydiff"))
        out = compare([subject], places, samples=1, budgets=(8,), against=["random", "knorm", "tova"])
        found.append({row.manager: row.loglik for row in out.rows})
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert "measured as two batches" in caplog.text
    Small.on_samples = lambda *arguments, **options: (_ for _ in ()).throw(FULL)
    with pytest.raises(OutOfMemoryError, match="alone does not fit"):
        compare([subject], [Scenario("llama", "words", Small(loaded()), Described())], samples=1, against=[])


# ---- how many fit ----------------------------------------------------------------------------------------------------


SPACE = {"manager": {"name": "feature_scorer", "options": {"features": ["keydiff", "age"], "budget": 200}}}
SETTINGS = ("tasks=[words]", "driver={name: random_search, population: 24}", "generations=2",
            "samples_per_generation=1", "train_contexts=2", "select={contexts: 1, top: 0}",
            "sealed={contexts: 1, exact: false}",
            "chance_contexts=0", "budgets=[200]")  # fmt: skip


class Long(Words):
    """Contexts whose caches are large against everything else."""

    def samples(self, split, n, seed):
        return [make_sample(1000 * len(split) + number, context=300, question=2, answer=2) for number in range(n)]


def bench(devices, store=1 << 20):
    def make(config):
        one = loaded("one")
        places = tuple(device for device in one.devices if device.type != "cpu")
        evaluator = Evaluator(one, config.protocol, store=PrefillStore(store))
        return Bench(evaluator, lambda task: Long(), devices=places, facts={"store_bytes": store})

    return make


def configured(*settings):
    return experiment(*SETTINGS, *settings, model={"name": "none", "device": "pretend:0"}, space=SPACE, chunk=None)


def test_the_batch_is_chosen_by_measurement_kept_in_the_journal_and_fits(tmp_path):
    chosen = []
    for capacity in (3 << 20, 12 << 20):
        folder = tmp_path / str(capacity)
        with PretendDevices(1, capacity) as devices:
            search(configured(), folder, bench(devices))
            assert devices.peak() <= capacity
        (event,) = events(folder)  # nothing had to be halved
        assert event["phase"] is None
        assert 0 < event["each"] < event["free"] <= capacity
        chosen.append(event["chunk"])
        assert max(trained(folder)) == min(24, event["chunk"])
    assert chosen[0] < 24
    assert chosen[0] < chosen[1]


def test_a_resumed_run_keeps_its_batch_on_a_device_with_more_memory(tmp_path):
    def stopping(make, after):
        def made_(config):
            one = make(config)
            evaluate, count = one.evaluator.evaluate, iter(range(after))

            def stopped(*arguments, **options):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return evaluate(*arguments, **options)

            one.evaluator.evaluate = stopped
            return one

        return made_

    with PretendDevices(1, 3 << 20) as devices, pytest.raises(KeyboardInterrupt):
        search(configured(), tmp_path, stopping(bench(devices), 9))
    (event,) = events(tmp_path)
    with PretendDevices(1) as devices:
        search(configured(), tmp_path, bench(devices), resume=True)
    assert events(tmp_path) == [event]
    assert max(trained(tmp_path)) == event["chunk"] < 24


def test_a_device_that_really_runs_out_is_given_back_what_failed(tmp_path):
    """The failed batch lives on in its traceback, if nobody lets go of it; then half of it would not fit either."""
    with PretendDevices(1, 3 << 20) as devices:
        search(configured("chunk=24"), tmp_path, bench(devices))
        assert devices.peak() <= 3 << 20
    assert [size for size, *_ in sizes(tmp_path)] in ([12], [12, 6], [12, 6, 3])


def test_on_the_processor_the_batch_is_what_it_was(tmp_path):
    config = experiment("generations=1", "tasks=[toy:a]", model="none", chunk=None).placed()
    assert (config.chunk, config.model.dtype) == (32, "float32")
    search(experiment("generations=1", "tasks=[toy:a]", chunk=None), tmp_path, factory(ToyEvaluator()))
    assert open_run(tmp_path).config.chunk == 32
    assert not events(tmp_path)


# ---- contexts that were read ----------------------------------------------------------------------------------------


def test_room_for_contexts_is_a_share_of_what_is_free_where_they_lie():
    free = free_bytes(CPU)
    assert free > 1 << 28
    assert room_for_readings([CPU]) == pytest.approx(max(2 << 30, free // 4), rel=0.3)
    with PretendDevices(2, capacity=8 << 30):
        places = [torch.device("pretend", number) for number in range(2)]
        assert room_for_readings(places) == (8 << 30) * 2 // 4
        store = PrefillStore()
        evaluator = Evaluator(loaded("two"), store=store)
        evaluator.evaluate([made("keydiff")], make_sample(), TASK)
        assert store.limit == pytest.approx((8 << 30) * 2 // 4, rel=0.01)


def test_a_context_larger_than_the_store_is_told_once(caplog):
    store = PrefillStore(1000)
    evaluator = Evaluator(loaded(), store=store)
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1, 0):
            evaluator.evaluate([made("keydiff")], make_sample(seed), TASK)
    assert caplog.text.count("there is room for 1,000") == 1


def test_the_store_may_get_other_memory_when_a_run_is_resumed(tmp_path):
    settings = ("generations=1", "tasks=[toy:a]")
    search(experiment(*settings, "store_bytes=1000000"), tmp_path, factory(ToyEvaluator()))
    again = search(experiment(*settings), tmp_path, factory(ToyEvaluator()), resume=True)
    assert np.isfinite(again.vector).all()
    assert json.loads((tmp_path / "result.json").read_text())


def test_a_command_whose_memory_ends_says_whose_and_what_to_do(tmp_path, monkeypatch):
    from evomem.cli.commands import compare as command

    def full(*arguments, **options):
        raise FULL

    monkeypatch.setattr(command, "compare", full)
    message = error("compare", "keydiff", "--json", tmp_path / "rows.json")
    assert "a device has no memory left (CUDA out of memory" in message
    assert "model.dtype" in message
    assert "Go on with" in message
    monkeypatch.setattr(command, "compare", lambda *arguments, **options: [].pop())
    with pytest.raises(IndexError):  # no other error is hidden
        run("compare", "keydiff")
