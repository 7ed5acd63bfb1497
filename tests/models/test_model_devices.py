"""Models on devices: types and places of weights, quantised ones, workers, and the commands that name a device."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from evomem.errors import ConfigError, ModelError, UnsupportedModelError
from evomem.evaluation import Evaluator
from evomem.evaluation.store import PrefillStore
from evomem.models import LoadedModel, load
from evomem.models.sharing import assemble, dismantle, why_not_shareable
from evomem.runs.bench import model_bench
from evomem.testing.conformance import CHECKS, run_check
from evomem.testing.models import tiny, tiny_tokenizer
from tests.cli.test_cli import error, run
from tests.evaluation.test_evaluation import (
    made,
    text,
)
from tests.memory.test_devices import SPLIT, loaded
from tests.support.synthetic_search import experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama", layers=2).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_model_has_the_checkpoints_type_on_an_accelerator_and_float32_on_the_processor(folder, devices):
    here, there = load(str(folder)), load(str(folder), device="pretend:1")
    assert (here.dtype, here.device_type, here.devices) == ("float32", "cpu", [torch.device("cpu")])
    assert (there.dtype, there.device_type, there.devices) == ("bfloat16", "pretend", [torch.device("pretend:1")])
    assert load(str(folder), device="pretend:0", dtype="float32").dtype == "float32"
    assert load(str(folder), dtype="auto").dtype == "bfloat16"
    assert load(str(folder), dtype=torch.float16).dtype == "float16"
    split = load(str(folder), device_map=SPLIT)
    assert (split.dtype, split.devices) == ("bfloat16", [torch.device("pretend:0"), torch.device("pretend:1")])
    # Straight to where they belong: every weight goes there once, and nothing comes back.
    devices.log.clear()
    load(str(folder), device="pretend:0")
    weights = sum(tensor.nbytes for tensor in there.model.parameters())
    assert sum(size for source, goal, size in devices.log.copies if goal == "pretend:0" and size > 4) < 1.2 * weights


def test_devices_and_types_that_do_not_exist_are_refused(folder, devices):
    for wish, message in (
        ({"device": "pretend:7"}, "no such device"), ({"device": "cuda:0"}, "no such device"),
        ({"device": "gpu"}, "is none"), ({"dtype": "int8"}, "dtype"), ({"dtype": "half-precise"}, "dtype"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load(str(folder), **wish)


def test_quantisation_is_handed_on_and_what_the_library_says_is_told(folder):
    with pytest.raises(ModelError, match="bitsandbytes"):
        load(str(folder), quantization={"load_in_8bit": True})
    config = experiment("model={name: x, quantization: {load_in_8bit: true}}")
    assert config.model.quantization == {"load_in_8bit": True}
    with pytest.raises(ConfigError, match="either a device or a device_map"):
        experiment("model={name: x, device: cpu, device_map: auto}")


def quantised(one):
    """As a library of 8-bit weights leaves a model: numbers that are no weights in a plain module's place."""
    layer = one.model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter((layer.weight * 10).to(torch.int8), requires_grad=False)
    return one


def configured_by_quantiser(one):
    one.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return one


@pytest.mark.parametrize("change", [quantised, configured_by_quantiser])
def test_a_quantised_model_is_loaded_by_every_worker_itself(change, monkeypatch):
    one = change(loaded())
    assert why_not_shareable(one)
    with pytest.raises(ModelError, match="cannot be shared"):
        dismantle(one)
    monkeypatch.setattr("evomem.runs.bench.load_model", lambda model: change(loaded()))
    config = experiment("model=llama", "tasks=[passkey]")
    shared = model_bench(config).in_workers
    assert shared.parts() == {}
    theirs = shared.make(config, {}, PrefillStore())
    assert theirs.provenance["device"] == "cpu"
    monkeypatch.setattr("evomem.runs.bench.load_model", lambda model: loaded())
    assert model_bench(config).in_workers.parts() != {}


def test_packed_numbers_are_never_taken_for_weights():
    """If a part gets lost on the way: the other process checks what it was given."""
    parts = dismantle(loaded())
    number = parts["names"]["model.layers.0.mlp.down_proj.weight"]
    array, _ = parts["arrays"][number]
    parts["arrays"][number] = array.astype("int8"), "int8"
    with pytest.raises(ModelError, match="int8"):
        assemble(parts)


def test_a_worker_without_the_searchs_kind_of_device_says_so(folder):
    parts = {**dismantle(loaded()), "device": "cuda"}
    with pytest.raises(ModelError, match="gpus-per-worker"):
        assemble(parts)


def test_managers_that_compare_heads_are_refused_where_heads_are_split_over_processes():
    """Every process of tensor parallel has some of the heads, and numbers them from 0."""
    model = tiny("llama", layers=2)
    good, bad = ("full", "streaming_llm", "snapkv(window=8)", "kv_policy", "namm(scorer=bam, selection=capped)",
                 "expected_attention", "pyramidkv(window=8)"), (
        "adakv(keydiff)", "random", "feature_scorer(layers=2, heads=2, knots=1)", "namm(scorer=bam, selection=dense)",
    )  # fmt: skip
    for spec in (*good, *bad):
        with made(spec).attach(model):
            pass
    model._tp_size = 2
    for spec in good:
        with made(spec).attach(model):
            pass
    for spec in bad:
        with pytest.raises(UnsupportedModelError, match="tensor parallel"), made(spec).attach(model):
            pass
    with pytest.raises(UnsupportedModelError, match="tensor parallel"):
        Evaluator(LoadedModel("llama", model, tiny_tokenizer(), "llama"))
    with pytest.raises(ModelError, match="tensor parallel"):
        dismantle(LoadedModel("llama", model, tiny_tokenizer(), "llama"))


def test_commands_run_where_they_are_told_and_record_it(folder, devices, tmp_path):
    rows = [
        {"context": text(7 * n, 40), "question": text(7 * n + 1, 3), "answers": [text(7 * n + 2, 2)], "split": split}
        for n, split in enumerate(("train", "train", "select", "select", "sealed", "sealed"))
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(json.dumps({**row, "id": str(n)}) for n, row in enumerate(rows)))
    task = ["--task", f"file:{tmp_path}/task.jsonl", "--samples", "2"]
    there = ["--model", folder, "--device", "pretend:1"]
    run("compare", "h2o", *task, *there, "--no-check", "--budgets", "9", "--against", "keydiff",
        "--json", tmp_path / "rows.json")  # fmt: skip
    told = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["device"], row["dtype"]) for row in told} == {("pretend:1 (Pretend)", "bfloat16")}
    run("transfer", "h2o", *task, *there, "--no-check", "--budgets", "9", "--against", "keydiff")
    run("trace", "-m", folder, *task[:2], "-n", "2", "--device", "pretend:0", "--out", tmp_path / "traces")
    space = {"manager": {"name": "feature_scorer", "options": {"budget": 9, "features": ["keydiff", "age"]}}}
    data = {
        "name": "small", "model": str(folder), "space": space, "tasks": [f"file:{tmp_path}/task.jsonl"],
        "driver": {"name": "random_search", "population": 2}, "generations": 1, "samples_per_generation": 1,
        "train_contexts": 2, "select": {"contexts": 2, "top": 0}, "sealed": {"contexts": 2}, "chance_contexts": 0,
        "against": ["keydiff"],
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(json.dumps(data))
    run("evolve", tmp_path / "small.yaml", "--device", "pretend:0", "--out", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    start = next(r for r in records if r.get("event") == "start")
    assert start["devices"] == {str(folder): "pretend:0 (Pretend)"}
    assert start["store_bytes"] > 0
    provenance = json.loads((tmp_path / "run" / "winner" / "plugin" / "provenance.json").read_text())
    assert (provenance["device"], provenance["dtype"]) == ("pretend", "bfloat16")
    assert {row["device"] for row in provenance["comparison"]} == {"pretend:0 (Pretend)"}
    message = error("evolve", tmp_path / "small.yaml", "--out", tmp_path / "run", "--resume")  # on the processor
    assert "model.device: pretend:0 -> null" in message or "model.dtype" in message
    assert "no such device" in error("compare", "h2o", *task, "--model", folder, "--device", "cuda:3", "--budgets", "9")


def test_the_conformance_kit_runs_where_the_model_is(devices):
    model, manager = loaded("two").model, made("kv_policy(actions=[store, evict, forget], hidden=3)")
    assert {"evicted_is_hidden", "beams", "ties"} < set(CHECKS)
    for name in ("evicted_is_hidden", "beams", "ties"):
        run_check(name, manager, model)
