"""Benchmarks: the plumbing on a tiny model; ratios are what they say; results are replaced whole or not at all.

Nothing here looks at how long anything takes.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import peak_memory, run
from benchmarks.measuring import QUICK, Line, Setting, Sizes, candidates, in_turns, line, ratios
from benchmarks.namm_shares import Newest, full_namm
from benchmarks.streaming import FEATURES, cut
from evomem import tasks
from evomem.errors import EvomemError
from evomem.managers.features import required
from evomem.managers.vector import to_vector
from evomem.memory import SlotCache, attached
from evomem.tasks import Split
from evomem.testing.models import tiny, tiny_tokenizer

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' account of memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def entries(path) -> dict[str, dict]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert len({entry["name"] for entry in lines}) == len(lines)
    return {entry["name"]: entry for entry in lines}


@pytest.mark.usefixtures("ray_here")
def test_a_quick_run_writes_every_line(folder, tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    subjects = [subject for subject in run.SUBJECTS if subject.run is not peak_memory.run]  # has a test of its own
    names = [subject.names[0] for subject in subjects]
    assert run.main([*names, "--quick", "--model", folder, "--output", str(output)]) == 0
    found = entries(output)
    named = {name for subject in subjects for name in subject.names}
    of_other_sizes = {f"attention.decode_overhead_batch_{batch}" for batch in QUICK.decode_batches}
    of_these_sizes = {f"attention.decode_overhead_batch_{batch}" for batch in Sizes().decode_batches}
    assert set(found) == named - of_these_sizes | of_other_sizes
    assert set(run.TARGETS) <= named | {peak_memory.NAME}
    for entry in found.values():
        assert set(entry) == {"name", "value", "unit"}
        assert math.isfinite(entry["value"])
    once = {name.rpartition(".")[2]: entry["value"] for name, entry in found.items() if "compress_once" in name}
    assert once["efficiency"] * once["bound"] == pytest.approx(once["speedup"])
    assert once["bound"] > 1
    shown = capsys.readouterr().out
    assert "≥ 0.85" in shown
    assert "evaluator.compress_once.speedup_first_generation" in shown


@LINUX
def test_a_process_of_its_own_says_what_reading_took(folder):
    """512 tokens: stock attention of 4 heads is 4 MiB a layer; streaming 32 slots stays far below that."""
    sizes = Sizes(namm_context=512, namm_every=32, namm_budget=32)
    elsewhere = peak_memory.in_its_own_process("stock", Setting(folder, sizes))
    assert elsewhere >= 4 << 20


def test_names_choose_lines_and_groups():
    assert [subject.names[0] for subject in run.chosen(["attention"])] == [
        "attention.prefill_overhead",
        "attention.decode_overhead",
    ]
    assert run.chosen(["namm.observe_share"]) == run.chosen(["namm.decide_share"])
    assert run.chosen([]) == list(run.SUBJECTS)
    with pytest.raises(EvomemError, match=r"attention\.decode_overhead"):
        run.chosen(["attention.decode"])


def test_lines_that_were_not_run_are_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = line("namm.decide_share", [0.3, 0.1, 0.2]), Line("attention.prefill_overhead", 1.0, "ratio", (1, 1))
    run.write_results(path, [first, second])
    run.write_results(path, [Line("namm.decide_share", 0.5, "ratio", (0.5, 0.5))])
    found = entries(path)
    assert list(found) == ["attention.prefill_overhead", "namm.decide_share"]  # in the order of the subjects
    assert found["namm.decide_share"]["value"] == 0.5
    assert found["attention.prefill_overhead"]["value"] == 1.0
    assert first.value == 0.2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ['{"name": "x"', "[]", '{"value": 1}'])
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, damage, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(damage)
    assert run.main(["--output", str(path)]) == 1
    assert f"{path}, line 1" in capsys.readouterr().err
    assert path.read_text() == damage


def test_sides_take_turns_and_ratios_are_of_the_same_round():
    order, clock = [], iter([2.0, 1.0, 30.0, 10.0, 8.0, 2.0])

    def side(name):
        def work():
            order.append(name)
            return next(clock)

        return work

    seconds = in_turns("x", {"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b"] * 3
    # The slow second round is slow for both: the median of the ratios is 3, the ratio of the medians would be 4.
    assert line("x", ratios(seconds["a"], seconds["b"])).value == 3
    with pytest.raises(EvomemError, match="at least 1"):
        in_turns("x", {}, 0)


@pytest.mark.parametrize(("space", "options"), [("feature_scorer", {}), ("namm_bam", {"selection": "capped"})])
def test_candidates_are_all_different_and_always_the_same(space, options):
    members = [tuple(to_vector(manager)) for manager in candidates(space, 5, budget=16, **options)]
    assert len(set(members)) == 5
    assert members == [tuple(to_vector(manager)) for manager in candidates(space, 5, budget=16, **options)]


def test_the_variants_of_namm_hold_as_many_slots_as_namm(folder):
    """Otherwise their difference would be that of another cache, not of the decisions and observations alone."""
    setting = Setting(folder)
    tokens = setting.tokens(1, 150)
    manager = full_namm(every=32, budget=40)
    observing = Newest(40, manager.schedule, manager.observes)
    held = []
    for policy in (manager, observing, Newest(40, manager.schedule)):
        with torch.no_grad(), attached(setting.loaded.model):
            cache = SlotCache.for_model(setting.loaded.model, policy)
            setting.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        held.append(torch.stack(cache.slots_held()))
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[0], held[2])
    assert bool((held[0] == 40 + 150 % 32).all())


def test_streaming_reads_exactly_the_tokens_asked_for():
    tokenizer = tiny_tokenizer()
    sample = tasks.build("multikey_1", tokenizer, 200).samples(Split.TRAIN, 1, 0)[0]
    shorter = cut(sample, tokenizer, 96)
    assert len(tokenizer.encode(shorter.context, add_special_tokens=False)) == 96
    assert sample.context.startswith(shorter.context)
    with pytest.raises(EvomemError, match="10000 tokens"):
        cut(sample, tokenizer, 10_000)
    assert FEATURES
    assert "attention_spectrum" not in required(FEATURES)


@LINUX
def test_the_peak_counts_what_is_already_freed():
    before = peak_memory.resident()
    peak_memory.forget_peak()
    held = bytearray(b"x") * (64 << 20)
    del held
    assert peak_memory.peak() - before > 60 << 20
    peak_memory.forget_peak()
    assert peak_memory.peak() - before < 32 << 20
