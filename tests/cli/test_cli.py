from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import evomem
from evomem.cli.app import app
from evomem.errors import ConfigError, EvomemError, RunError
from evomem.plugins import FILES, is_plugin
from evomem.report.tables import read_rows
from evomem.runs import load_experiment, search
from evomem.testing.models import tiny, tiny_tokenizer

WORDS = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "grass"]


def run(*words, code=0):
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == code, outcome.output
    return outcome


def error(*words):
    """The message of a command that fails, which must be one for users."""
    outcome = run(*words, code=2)
    assert outcome.stderr.startswith("error: ")
    assert "Traceback" not in outcome.output
    return outcome.stderr


def questions(model, tokenizer):
    """Rows whose answers this random model can tell from the context only, so that the chance check is passed."""
    rng = np.random.default_rng(0)
    ids = torch.tensor([tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS])

    def scores(text):
        tokens = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        return model(tokens).logits[0, -1].log_softmax(-1)[ids]

    for split in ("train", "select", "sealed"):
        for number in range(3):
            context, question = " ".join(rng.choice(WORDS, 30)), f" what {rng.choice(WORDS)} ?"
            gain = scores(f"{context}\n{question}") - scores(question)
            yield {
                "context": context, "question": question, "answers": [WORDS[int(gain.argmax())]],
                "split": split, "id": f"{split} {number}", "max_new_tokens": 2,
            }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, a task, an experiment, and a finished run of it."""
    root = tmp_path_factory.mktemp("world")
    model, tokenizer = tiny("llama", layers=2), tiny_tokenizer()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = list(questions(model, tokenizer))
    (root / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = {
        "name": "small",
        "model": str(root / "model"),
        "space": {
            "manager": {"name": "feature_scorer", "options": {"budget": 16, "knots": 1, "features": ["keydiff", "age"]}}
        },
        "tasks": [f"file:{root}/task.jsonl"],
        "driver": {"name": "random_search", "population": 3},
        "generations": 2,
        "samples_per_generation": 1,
        "train_contexts": 2,
        "budgets": [16],
        "select": {"contexts": 2, "top": 1},
        "sealed": {"contexts": 3},
        "against": ["keydiff", "random"],
    }
    (root / "small.yaml").write_text(json.dumps(experiment))
    (root / "said").write_text(run("evolve", root / "small.yaml", "--out", root / "run", "-s", "seed=3").output)
    return root


def test_a_search_leaves_everything_in_its_folder(world):
    folder, said = world / "run", (world / "said").read_text()
    for name in ("config.yaml", "journal.jsonl", "result.json", "comparison.json", "comparison.md"):
        assert (folder / name).stat().st_size > 0
    for name in ("fitness.png", "memory.png", "heads.png"):
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "comparison.json").read_text())
    assert {(row["manager"], row["budget"]) for row in rows} == {
        ("small", 16), ("keydiff", 16), ("random", 16), ("full", None),
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "comparison.samples.jsonl").read_text().splitlines()[1:]]
    for place, row in enumerate(["small", "keydiff", "random", "full"]):
        values = [line["evaluations"][place]["loglik"] for line in lines]
        assert next(r["loglik"] for r in rows if r["manager"] == row) == pytest.approx(np.mean(values))
    provenance = json.loads((folder / "winner" / "plugin" / "provenance.json").read_text())
    assert all(np.shape(row["head_slots"]) == (2, 2) for row in rows)
    bare = {"head_slots": None, "head_bytes": None}  # a plug-in has its own heads' numbers, the run has all
    assert provenance["comparison"] == [row if row["role"] == "subject" else {**row, **bare} for row in rows]
    assert {"model_digest", "space", "driver", "seed", "generations", "spent", "fitness_curve", "evomem_code"} <= set(
        provenance
    )
    card = (folder / "winner" / "plugin" / "README.md").read_text()
    assert "**small**" in card
    for name, plot in (("fitness.png", "fitness.png"), ("comparison.png", "memory.png"), ("heads.png", "heads.png")):
        assert f"](assets/{name})" in card
        assert (folder / "winner/plugin/assets" / name).read_bytes() == (folder / "plots" / plot).read_bytes()
    assert "3 sealed samples" in said
    assert "winner's fitness: train" in said
    assert f"evomem export {folder}" in said
    assert "evomem compare" in said


@pytest.mark.parametrize("how", ["changes by dotted key", "after a search without a report"])
def test_python_leaves_the_same_folder_as_the_command(world, tmp_path, monkeypatch, how):
    there, here = world / "run", tmp_path / "run"
    if how == "changes by dotted key":
        other = json.loads((world / "small.yaml").read_text())
        other |= {"driver": {"name": "cmaes"}, "sealed": {"contexts": 2}}
        (tmp_path / "other.yaml").write_text(json.dumps(other))
        changes = {"driver.name": "random_search", "driver.population": 3, "sealed.contexts": 3, "seed": 3}
        monkeypatch.setattr("evomem.runs.pools.cores", lambda: 1)  # room for one: this process
        evomem.evolve(tmp_path / "other.yaml", out=here, workers="auto", **changes)
    else:
        search(load_experiment(world / "small.yaml", ["seed=3"]), here)
        assert not (here / "comparison.json").exists()
        with pytest.raises(RunError, match=r"holds a run already.*resume=True"):
            evomem.evolve(world / "small.yaml", out=here, seed=3)
        with pytest.raises(RunError, match="seed: 3 -> 4"):
            evomem.evolve(world / "small.yaml", out=here, resume=True, seed=4)
        found = evomem.evolve(world / "small.yaml", out=here, resume=True, seed=3)
        assert found.winner_vector.tobytes() == evomem.open_run(there).winner_vector.tobytes()
    files = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (there, here)]
    assert files[0] == files[1]
    known, mine = (json.loads((f / "winner/plugin/provenance.json").read_text()) for f in (there, here))
    timed = ("seconds", "total_seconds")

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if not any(word in k for word in timed)}
        return [untimed(one) for one in value] if isinstance(value, list) else value

    assert untimed(known) == untimed(mine)
    for name in ("winner/vector.npy", "winner/plugin/model.safetensors", "winner/plugin/config.json", "config.yaml"):
        assert (there / name).read_bytes() == (here / name).read_bytes()


def test_a_finished_run_is_shown_again_and_another_one_refused(world):
    before = (world / "run" / "comparison.json").read_bytes()
    message = error("evolve", world / "small.yaml", "--out", world / "run", "-s", "seed=3")
    assert "--resume" in message
    again = run("evolve", world / "small.yaml", "--out", world / "run", "-s", "seed=3", "--resume").output
    assert "this run is finished" in again
    assert "keydiff" in again
    assert (world / "run" / "comparison.json").read_bytes() == before
    message = error("evolve", world / "small.yaml", "--out", world / "run", "-s", "seed=4", "--resume")
    assert "seed: 3 -> 4" in message


def test_a_run_compares_like_its_plug_in_and_like_its_own_report(world, tmp_path):
    run("export", world / "run", tmp_path / "plug")
    assert sorted(path.name for path in (tmp_path / "plug").iterdir()) == sorted([*FILES, "assets"])
    rows = {}
    for subject in (world / "run", tmp_path / "plug"):
        outcome = run("compare", subject, "--against", "keydiff,random", "-n", 3, "--json", "-")
        rows[subject] = [{**row, "seconds": 0} for row in json.loads(outcome.stdout)]
        assert "advantage" in outcome.stderr
    own = [{**row, "seconds": 0} for row in json.loads((world / "run" / "comparison.json").read_text())]
    assert rows[world / "run"] == rows[tmp_path / "plug"] == own


def test_python_compares_like_the_command(world, tmp_path):
    rows = [{**row, "seconds": 0} for row in json.loads((world / "run" / "comparison.json").read_text())]
    run_there, loaded = evomem.open_run(world / "run"), evomem.load_model(str(world / "model"), dtype="float32")
    renamed = replace(loaded, name=rows[0]["model"])
    seen = []
    for subject, out, models in ((world / "run", None, ()), (run_there, tmp_path / "rows.json", renamed)):
        found = evomem.compare(
            subject, against=["keydiff", "random"], samples=3, models=models, out=out,
            progress=lambda *counts: seen.append(counts),
        )  # fmt: skip
        assert [{**row.to_json(), "seconds": 0} for row in found] == rows
    assert read_rows(tmp_path / "rows.json") == found
    assert (tmp_path / "rows.samples.jsonl").exists()
    assert (0, 3) in seen or (1, 3) in seen
    assert (3, 3) in seen
    (one,) = evomem.compare(evomem.build("keydiff(budget=8)"), tasks=f"file:{world}/task.jsonl", models=loaded,
                            against=[], samples=2, exact=False, check=False)  # fmt: skip
    assert (one.manager, one.budget, one.samples) == ("keydiff", 8, 2)


@pytest.mark.parametrize(
    ("subjects", "options", "message"),
    [
        ([], {}, "at least one run"),
        ("keydif", {}, "'keydif'"),
        ([evomem.build("keydiff"), evomem.build("keydiff")], {"budgets": 8}, r"two managers.*are called 'keydiff"),
        ("keydiff", {}, "no budget of its own"),
        ("keydiff", {"budgets": 8}, "say what to measure on"),
        ("keydiff", {"budgets": True}, "budget"),
        ("keydiff", {"budgets": 8, "against": "snapkw"}, "'snapkw'"),
        ("keydiff", {"budgets": 8, "split": "test"}, "split 'test': is none of train, select, sealed"),
        ("keydiff", {"budgets": 8, "samples": 0}, "samples: 0; at least 1"),
        ("keydiff", {"budgets": 8, "tasks": "needles"}, "'needles'"),
        ("keydiff", {"budgets": 8, "out": "-"}, "out: - is no file"),
        ("keydiff", {"budgets": 8, "tasks": "passkey:length=200", "protocol": "stream"}, "streaming:512"),
    ],
)
def test_python_refuses_what_the_command_refuses(subjects, options, message, monkeypatch):
    monkeypatch.setattr("evomem.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        evomem.compare(subjects, **options)


def test_compare_writes_rows_and_samples(world, tmp_path):
    file = tmp_path / "rows.json"
    common = [
        "--model",
        world / "model",
        "--task",
        f"file:{world}/task.jsonl",
        "--no-exact",
        "--no-check",
        "--json",
        file,
    ]
    shown = run("compare", "keydiff", world / "run", "--against", "snapkv(window=4, kernel=3),h2o",
                "--budgets", "8,0.5", "--samples", 2, "--protocol", "streaming:10", *common).stdout  # fmt: skip
    assert "snapkv(window=4, kernel=3)" in shown
    rows = json.loads(file.read_text())
    assert len(rows) == 4 * 2 + 1
    assert {row["protocol"] for row in rows} == {"streaming:10/query_agnostic"}
    assert all(row["score"] is None for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.samples.jsonl"]
    shown = run("evaluate", "full", "-m", world / "model", "-t", f"file:{world}/task.jsonl", "-n", 2).stdout
    assert "full" in shown


def test_compare_prices_memory_without_measuring_again(world, tmp_path):
    words = ["compare", world / "run", "keydiff(budget=4)", "--against", "none", "-n", 2, "--no-exact", "--no-check"]
    found = [json.loads(run(*words, "--price-per-megabyte", price, "--json", "-").stdout) for price in (0, 30)]
    for free, dear in zip(*(sorted(rows, key=lambda row: row["manager"]) for rows in found), strict=True):
        assert free["net"] == free["loglik"]
        assert dear["net"] == pytest.approx(dear["loglik"] - 30 * dear["bytes_mean"] / 1e6)
    assert len({row["budget"] for row in found[0]}) == 2  # each at its own
    shown = [run(*words, "--price-per-megabyte", price, "--json", tmp_path / "rows.json") for price in (0, 30)]
    assert "At 30 nats per MB, on 2 sealed samples: " in " ".join(shown[1].stdout.split())
    assert json.loads((tmp_path / "rows.json").read_text())[0]["price_per_megabyte"] == 30
    assert "price_per_megabyte: nan" in error(*words, "--price-per-megabyte", "nan")


@pytest.mark.parametrize("objective", ["loglik", "exact"])
def test_the_price_of_a_search_is_that_of_its_report(world, tmp_path, objective, caplog):
    """A price in units of another objective says nothing about likelihoods, and is not taken for one."""
    settings = ["fitness.price_per_megabyte=30", f"fitness.objective={objective}", "generations=1"]
    changes = [word for setting in settings for word in ("-s", setting)]
    run("evolve", world / "small.yaml", "--out", tmp_path / "run", *changes)
    rows = read_rows(tmp_path / "run" / "comparison.json")
    text = (tmp_path / "run" / "comparison.md").read_text()
    assert {row.price_per_megabyte for row in rows} == {30.0 if objective == "loglik" else None}
    assert ("At 30 nats per MB, on " in text) == (objective == "loglik")
    assert ("no net is shown" in caplog.text) == (objective == "exact")


def test_errors_name_what_was_wrong_and_end_with_2(world, tmp_path):
    model = ["--model", str(world / "model"), "--task", f"file:{world}/task.jsonl"]
    assert "Known: demo" in error("evolve", "nonesuch")
    assert "generatons" in error("evolve", world / "small.yaml", "--out", tmp_path / "x", "-s", "generatons=3")
    assert "--workers many" in error("evolve", world / "small.yaml", "--workers", "many", "--out", tmp_path / "x")
    for against in ("[keydif]", "['']", "[random, 'snapkv(windw=4)']"):  # not after hours
        words = ["evolve", world / "small.yaml", "--out", tmp_path / "x", "-s", f"against={against}"]
        assert "manager" in error(*words)
    assert not (tmp_path / "x").exists()
    assert "'keydif'" in error("compare", "keydif", "--budgets", "8", *model)
    assert "no such folder" in error("compare", tmp_path / "runs" / "gone", *model)
    assert "neither a run" in error("compare", tmp_path, *model)
    assert "--budgets" in error("compare", "keydiff", *model)
    assert "'many'" in error("compare", "keydiff", "--budgets", "8,many", *model)
    assert "budget" in error("compare", "keydiff", "--budgets", "0", *model)
    assert "--task" in error("compare", "keydiff", "--budgets", "8", "--model", world / "model")
    assert "streaming:512" in error("compare", "keydiff", "--budgets", "8", "--protocol", "stream", *model)
    assert "nowhere" in error("compare", "keydiff", "--budgets", "8", "--model", tmp_path / "nowhere", *model[2:])
    assert "3 of 9 samples" in run("evaluate", "keydiff", "--budgets", "8", "-n", "9", *model).stdout
    assert "no such run" in error("export", tmp_path / "gone", tmp_path / "plug")
    assert "no manager either" in error("export", "keydif", tmp_path / "plug")
    assert "give --budget" in error("export", "keydiff", tmp_path / "plug")
    (world / "run" / "winner" / "notes").mkdir()
    (world / "run" / "winner" / "notes" / "a").write_text("")
    assert "is no plug-in" in error("export", world / "run", world / "run" / "winner" / "notes")


def test_an_interrupt_says_how_to_go_on(world, tmp_path, monkeypatch):
    from evomem.report import comparing, evolving

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evolving, "search", interrupt)
    said = run("evolve", world / "small.yaml", "-s", "name=two words", "--out", tmp_path / "r", code=130).stderr
    assert f"resume with: evomem evolve {world}/small.yaml -s 'name=two words' --out {tmp_path}/r --resume" in said
    said = run("train", world / "small.yaml", "--out", tmp_path / "r", code=130).stderr
    assert f"resume with: evomem train {world}/small.yaml --out {tmp_path}/r --resume" in said
    monkeypatch.setattr(comparing, "compare_managers", interrupt)
    words = ["compare", world / "run", "-n", 2]
    assert "resume" not in run(*words, code=130).stderr
    assert "resume" in run(*words, "--json", tmp_path / "rows.json", code=130).stderr


def test_a_task_at_chance_is_refused(world, tmp_path):
    rows = [json.loads(line) for line in (world / "task.jsonl").read_text().splitlines()]
    answers = [row["answers"] for row in rows]
    for row, other in zip(rows, answers[1:] + answers[:1], strict=True):  # answers to other questions
        row["answers"] = [word for word in WORDS if [word] not in (row["answers"], other)][:1]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["keydiff", "--budgets", "8", "--against", "none", "-n", 3, "--model", world / "model"]
    words += ["--task", f"file:{tmp_path}/task.jsonl"]
    assert "measures nothing" in error("compare", *words)
    run("compare", *words, "--no-check")


def test_traces_are_recorded_gone_on_with_and_refused(world, tmp_path):
    from evomem.evaluation.traces.store import Traces

    words = ["trace", "--model", world / "model", "--task", f"file:{world}/task.jsonl", "--out", tmp_path / "traces"]
    shown = run(*words, "-n", 2, "--features", "mean:3:keydiff, age")
    assert "2 samples, 2 of them recorded now" in shown.stdout
    assert "times as much" in shown.stdout
    assert "for 2 samples" in shown.stderr
    shown = run(*words, "-n", 3, "--features", "keydiff,age", "--limit", "1KB")
    assert "2 samples, 0 of them recorded now" in shown.stdout
    assert "1 of 3 samples did not fit in --limit 1KB" in shown.stdout
    traces = Traces.open(tmp_path / "traces")
    assert traces.manifest.header.features == ("age", "keydiff")
    assert len({trace.sample for trace in traces if "train" in trace.sample}) == 2
    assert "features" in error(*words, "-n", 2)
    assert "seed: 0 -> 1" in error(*words, "-n", 2, "--features", "keydiff,age", "--seed", 1)
    assert "'keydif'" in error(*words, "--features", "keydif")
    assert "2 gigs" in error(*words, "--limit", "2 gigs")


def test_train_is_evolve(world, tmp_path):
    run("train", world / "small.yaml", "--out", tmp_path / "run", "-s", "seed=3")
    mine, theirs = (
        [{**row, "seconds": 0} for row in json.loads((folder / "comparison.json").read_text())]
        for folder in (tmp_path / "run", world / "run")
    )
    assert mine == theirs
    shown = run("train", "--help").stdout
    assert "evomem train policy_needle" in shown
    assert "evolve" in shown


def test_lists_name_everything_that_is_registered(world):
    from evomem.cli.options import Listing
    from evomem.managers import names

    found = json.loads(run("list", "--json").stdout)
    assert list(found) == list(Listing)
    assert list(found["managers"]) == names()
    assert all(found["managers"].values())
    assert {"cmaes", "random_search"} <= set(found["drivers"])
    assert "keydiff" in run("list", "managers").stdout
    for section, page in (("allocations", "docs/allocations.md"), ("drivers", "docs/drivers.md")):
        assert run("list", section).stdout.rstrip().endswith(f"{page} says which to take when")
    (first, *_) = json.loads(run("models", "--json").stdout)
    assert first["state"] in ("ready", "installed", "missing")
    assert first["name"] in run("models").stdout
    assert issubclass(ConfigError, EvomemError)
    assert is_plugin(world / "run" / "winner" / "plugin")
