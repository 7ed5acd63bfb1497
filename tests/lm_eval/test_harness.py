"""Managed memory in lm-evaluation-harness: the figures of ``hf`` where all is kept, of our Evaluator elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evomem.errors import ConfigError, UnsupportedModelError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers import MemoryManager, build
from evomem.models import LoadedModel
from evomem.plugins import save
from evomem.plugins.lm_eval import EvomemLM
from evomem.tasks.base import Sample
from evomem.testing.comparing import greedy, read
from evomem.testing.models import tiny, tiny_tokenizer, tiny_unsupported
from evomem.testing.reference import Batch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny("llama", layers=2).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (ROOT / "tests/data/lm_eval_choice.jsonl").read_text().splitlines()]
    asked = [(f"{row['context']} {row['question']}", f" {choice}") for row in rows for choice in row["choices"]]
    return [*asked, (asked[0][0], " red bird is"), ("the", " grass is green"), ("", "the sky is")]


def harness(folder: Path, model: str, out: Path, tasks: str, **arguments: object) -> dict:
    """Run the harness's command line; return results and samples."""
    words = ",".join(f"{key}={value}" for key, value in {"pretrained": folder, **arguments}.items())
    command = [
        sys.executable, "-m", "evomem.plugins.lm_eval", "--model", model, "--model_args", words, "--tasks", tasks,
        "--include_path", "tests/lm_eval/tasks", "--device", "cpu", "--batch_size", "3", "--output_path", str(out),
        "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    (results,) = out.rglob("results_*.json")
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            samples[path.name.split("_2")[0], row["doc_id"]] = row["resps"]
    return {**json.loads(results.read_text()), "samples": samples}


def numbers(responses: dict) -> list[float]:
    flat = json.loads(json.dumps([responses[key] for key in sorted(responses)]))
    found: list[float] = []

    def walk(x: object) -> None:
        if isinstance(x, list):
            for y in x:
                walk(y)
        else:
            try:
                found.append(float(str(x)))
            except ValueError:
                found.append(float(hash(str(x)) % 1000))

    walk(flat)
    return found


@pytest.mark.timeout(900)  # three starts of the command line
def test_command_line_with_everything_kept_equals_hf(folder: Path, tmp_path: Path) -> None:
    tasks = "evomem_choice,evomem_text"
    theirs = harness(folder, "hf", tmp_path / "hf", tasks)
    ours = harness(folder, "evomem", tmp_path / "evomem", tasks, manager="full")
    assert len(ours["samples"]) == 18
    assert numbers(ours["samples"]) == pytest.approx(numbers(theirs["samples"]), abs=1e-4)
    for task in tasks.split(","):
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, nan_ok=True), metric
    assert ours["config"]["manager"]["name"] == "full"
    fewer = harness(folder, "evomem", tmp_path / "fewer", tasks, manager="keydiff", budget=8)
    assert numbers(fewer["samples"]) != pytest.approx(numbers(theirs["samples"]), abs=1e-2)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, at) for at, each in enumerate(arguments)]


def evaluated(folder: Path, manager: MemoryManager, requests: list[tuple[str, str]], every: int) -> list[float]:
    """The log-likelihoods that evomem's Evaluator gives, one request after the other from an empty cache."""
    loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")
    protocol = EvaluationProtocol(kind="streaming", every=every) if every else EvaluationProtocol()
    evaluator = Evaluator(loaded, protocol)
    found = []
    for at, (context, continuation) in enumerate(requests):
        sample = Sample(str(at), context, "", continuation, (), 0)
        tokens = len(loaded.tokenizer.encode(continuation, add_special_tokens=False))
        found.append(tokens * evaluator.evaluate_plainly(manager, sample, None).loglik)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("spec", "every"),
    [("keydiff(budget=9)", 0), ("h2o(budget=9)", 0), ("snapkv(budget=0.3, window=4)", 0), ("knorm(budget=9)", 7)],
)
def test_evicting_equals_our_evaluator(folder: Path, requests: list, spec: str, every: int, size: int) -> None:
    model = EvomemLM(str(folder), manager=spec, every=every, device="cpu", batch_size=size)
    got = model.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    wanted = evaluated(folder, build(spec), requests[:-2], every)
    assert [score for score, _ in got[:-2]] == pytest.approx(wanted, abs=1e-4)
    # Where there is no context, nothing can be evicted before the scoring.
    stock = HFLM(str(folder), device="cpu", batch_size=1).loglikelihood(instances("loglikelihood", requests[-2:]))
    assert [score for score, _ in got[-2:]] == pytest.approx([score for score, _ in stock], abs=1e-4)


def test_everything_kept_says_what_is_greedy_as_hf_does(folder: Path, requests: list) -> None:
    tokenizer, model = tiny_tokenizer(), tiny("llama", layers=2)
    context = tokenizer(requests[0][0], return_tensors="pt").input_ids
    following = greedy(model, None, context, 3)[0].tolist()
    both = []
    for lm in (EvomemLM(str(folder), device="cpu", batch_size=5), HFLM(str(folder), device="cpu")):
        both.append(lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True))
        both[-1] += lm._loglikelihood_tokens([(None, context[0].tolist(), following)], disable_tqdm=True)
    assert [hit for _, hit in both[0]] == [hit for _, hit in both[1]]
    assert both[0][-1][1]
    assert [s for s, _ in both[0]] == pytest.approx([s for s, _ in both[1]], abs=1e-4)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
def test_generation_equals_our_own(folder: Path, requests: list, more: dict) -> None:
    manager = build("keydiff(budget=9)")
    contexts = [context for context, _ in requests[:48:8]]
    lm = EvomemLM(str(folder), manager=manager, device="cpu", batch_size=4)
    options = {"until": ["nothing stops it"], "max_gen_toks": 6, "do_sample": False, **more}
    got = lm.generate_until(instances("generate_until", [(c, dict(options)) for c in contexts]), disable_tqdm=True)
    model, tokenizer = tiny("llama", layers=2), tiny_tokenizer()
    for context, text in zip(contexts, got, strict=True):
        row = tokenizer(context, return_tensors="pt").input_ids
        with manager.attach(model) as cache:
            with cache.reading():
                read(model, cache, Batch.of([row[0, :-1]]))
            cache.batch_repeat_interleave(more.get("num_beams", 1))
            wanted = greedy(model, cache, row, 6, **more)
        assert text == tokenizer.decode(wanted[0], skip_special_tokens=True)


def test_rolling(folder: Path, requests: list) -> None:
    texts = [(context,) for context, _ in requests[:48:16]]
    asked = instances("loglikelihood_rolling", texts)
    stock = HFLM(str(folder), device="cpu").loglikelihood_rolling(asked, disable_tqdm=True)
    full = EvomemLM(str(folder), device="cpu", batch_size=2).loglikelihood_rolling(asked, disable_tqdm=True)
    assert full == pytest.approx(stock, abs=1e-3)
    manager = build("streaming_llm(budget=8, every=5)")
    lm = EvomemLM(str(folder), manager=manager, device="cpu", batch_size=2)
    got = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    model, tokenizer = tiny("llama", layers=2), tiny_tokenizer()
    for (text,), score in zip(texts, got, strict=True):
        row = torch.tensor([lm.prefix_token_id, *tokenizer.encode(text, add_special_tokens=False)])
        with manager.attach(model) as cache:
            logits = read(model, cache, Batch.of([row[:-1]]))[0].log_softmax(-1)
        assert score == pytest.approx(float(logits.gather(1, row[1:, None]).sum()), abs=1e-3)
    assert got != pytest.approx(full, abs=1e-2)


@pytest.mark.parametrize("asked", [("the sky is", ""), ("the sky is", "\n"), ("\n", " blue")])
def test_nothing_has_no_likelihood(folder: Path, asked: tuple[str, str]) -> None:
    """A choice without a token had the log-likelihood 0, the largest there is, and won; ``hf`` does not score it."""
    lm = EvomemLM(str(folder), device="cpu")
    both = [("the sky is", " blue"), asked]
    with pytest.raises(ConfigError, match="has no token"):
        lm.loglikelihood(instances("loglikelihood", both), disable_tqdm=True)
    for context, continuation in (([5, 6], []), ([], [7]), ([], [])):
        with pytest.raises(ConfigError, match="has no token"):
            lm._loglikelihood_tokens([(None, [5], [6]), (None, context, continuation)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="has no token"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("the sky",), ("\n",)]), disable_tqdm=True)


def test_a_plug_in_and_what_is_refused(folder: Path, tmp_path: Path, requests: list) -> None:
    save(build("keydiff(budget=0.5)"), tmp_path / "plugin", {})
    lm = EvomemLM(str(folder), manager=str(tmp_path / "plugin"), budget=9, device="cpu")
    assert lm.manager.describe() == build("keydiff(budget=9)").describe()
    with pytest.raises(ConfigError, match="every=N"):
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("the sky is blue",)]))
    with pytest.raises(ConfigError, match="auto"):
        EvomemLM(str(folder), batch_size="auto", device="cpu")
    with pytest.raises(ConfigError, match="Did you mean 'keydiff'"):
        EvomemLM(str(folder), manager="keydif", device="cpu")
    tiny_unsupported().save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(UnsupportedModelError):
        EvomemLM(str(tmp_path / "mamba"), device="cpu")
