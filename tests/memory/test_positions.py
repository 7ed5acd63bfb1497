"""Texts longer than a model can read: refused where it has a table of positions, said where its positions rotate."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPTJConfig, OPTConfig
from typer.testing import CliRunner

from evomem.cli.app import app
from evomem.errors import ModelError, TaskError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.measurement import EXACT
from evomem.evaluation.traces.recording import record
from evomem.managers import build as manager_of
from evomem.memory.kv.positions import PositionLimit, position_limit
from evomem.models import LoadedModel
from evomem.models.architectures.decision_transformer import DecisionStream, DecisionStreamConfig, stream_tokenizer
from evomem.report.tables import markdown, notes
from evomem.runs.bench import Bench
from evomem.runs.experiment_file import parse_experiment
from evomem.runs.samples import Samples
from evomem.tasks import Split, build
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

LIMIT = 64
WORDS = "the cat is red . a dog is blue . "


def small(family: str, **more) -> LoadedModel:
    model = tiny(family, layers=2, max_position_embeddings=LIMIT, **more)
    return LoadedModel(family, model, tiny_tokenizer(), family)


def rows(path, context: int, **more):
    """A file of rows with contexts of so many tokens, two of question, one of answer."""
    row = {"context": " ".join((WORDS * context).split()[:context]), "question": "what ?", "answers": ["cat"], **more}
    splits = ("sealed", "select", "train")
    path.write_text("\n".join(json.dumps({**row, "id": i, "split": s}) for i, s in enumerate(splits, 1)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def gpt2() -> LoadedModel:
    return small("gpt2")


# ---- the limit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),  # stated stretched
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0}, 64,
        ),
    ],
)  # fmt: skip
def test_the_limit_of_rotary_positions(rope: dict, tokens: int) -> None:
    model = tiny("llama", layers=1, max_position_embeddings=LIMIT, rope_parameters={"rope_theta": 1e4, **rope})
    assert position_limit(model) == PositionLimit(tokens, learned=False)


def test_the_limit_of_tables() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTConfig(**sizes, max_position_embeddings=77, word_embed_proj_dim=32, ffn_dim=32)
    gptj = GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=77)
    found = [AutoModelForCausalLM.from_config(config).eval() for config in (opt, gptj, BloomConfig(**sizes))]
    assert [getattr(position_limit(model), "tokens", None) for model in found] == [77, 77, None]
    assert position_limit(tiny("gpt2", layers=1, max_position_embeddings=LIMIT)) == PositionLimit(LIMIT, learned=True)
    for model in found[:2]:  # to the last position, and not one further
        model(torch.zeros(1, 77, dtype=torch.int64))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(1, 78, dtype=torch.int64))
    stream = DecisionStream(DecisionStreamConfig(max_ep_len=5, state_dim=1, act_dim=2, hidden_size=32, n_head=1))
    assert position_limit(stream) == PositionLimit(15, learned=True)


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["query_agnostic", "query_aware"])
@pytest.mark.parametrize("kind", ["compress_once", "streaming"])
def test_a_sample_that_just_fits_and_one_that_does_not(gpt2: LoadedModel, kind: str, mode: str, tmp_path) -> None:
    evaluator = Evaluator(gpt2, EvaluationProtocol(kind=kind, mode=mode, every=9))
    task = build(rows(tmp_path / "fits.jsonl", LIMIT - 2, metric="loglik"), gpt2.tokenizer)
    (fits,) = task.samples("sealed", 1, 0)
    assert evaluator.check_positions([fits]).longest == LIMIT  # the answer's last token is not read
    manager = manager_of("streaming_llm(budget=8)")
    assert evaluator.evaluate([manager], fits, task)[0].loglik < 0
    task = build(rows(tmp_path / "long.jsonl", LIMIT - 1, metric="loglik"), gpt2.tokenizer)
    (long,) = task.samples("sealed", 1, 0)
    for measure in (
        lambda: evaluator.evaluate([manager], long, task),
        lambda: evaluator.evaluate_plainly(manager, long, task),
        lambda: evaluator.check_positions([fits, long]),
        lambda: compare([NamedManager("it", manager)], [Scenario("gpt2", "x", evaluator, task)], samples=1, against=[]),
        lambda: record(gpt2, task, "x", tmp_path / "traces", samples=1, split=Split.SEALED),
    ):
        with pytest.raises(TaskError, match=r"file/sealed/1: 65 tokens .* positions for 64 tokens.*shorter length"):
            measure()


def test_what_is_generated_counts(gpt2: LoadedModel, tmp_path) -> None:
    evaluator, manager = Evaluator(gpt2), manager_of("full")
    for new, fine in ((LIMIT - 21, True), (LIMIT - 20, False), (5000, False)):
        task = build(rows(tmp_path / f"{new}.jsonl", 20, max_new_tokens=new), gpt2.tokenizer)
        (sample,) = task.samples("sealed", 1, 0)
        assert evaluator.evaluate([manager], sample, task)[0].exact is None  # nothing is generated
        if fine:
            assert evaluator.check_positions([sample], exact=True).longest == LIMIT
            evaluator.evaluate([manager], sample, task, EXACT)
            continue
        with pytest.raises(TaskError, match="smaller max_new_tokens"):
            evaluator.check_positions([sample], exact=True)
        with pytest.raises(TaskError, match="max_new_tokens"):
            evaluator.evaluate([manager], sample, task, EXACT)


def test_a_search_says_so_before_it_measures(gpt2: LoadedModel, tmp_path) -> None:
    spec = rows(tmp_path / "long.jsonl", LIMIT)
    config = parse_experiment(
        {"name": "x", "model": "gpt2", "space": "feature_scorer", "tasks": [spec], "train_contexts": 1,
         "samples_per_generation": 1}
    )  # fmt: skip
    bench = Bench(Evaluator(gpt2), lambda task: build(task.spec, gpt2.tokenizer))
    with pytest.raises(TaskError, match="positions for 64 tokens"):
        Samples(config, bench).check()


def test_rotary_models_go_on_and_say_so(tmp_path) -> None:
    loaded = small("llama")
    task = build(rows(tmp_path / "long.jsonl", LIMIT + 20), loaded.tokenizer)
    place = Scenario("llama", "long", Evaluator(loaded), task)
    subject = [NamedManager("it", manager_of("keydiff(budget=8)"))]
    found = compare(subject, [place], samples=1, against=[], exact=False).rows
    assert (found[0].longest, found[0].positions) == (LIMIT + 22, LIMIT)
    said = "up to 86 tokens, but the model was made for 64 positions"
    assert any(said in note for note in notes(found))
    assert said in markdown(found)
    within = compare(
        subject,
        [Scenario("llama", "short", Evaluator(loaded), build(rows(tmp_path / "s.jsonl", 20), loaded.tokenizer))],
        samples=1, against=[], exact=False,
    ).rows  # fmt: skip
    assert (within[0].longest, within[0].positions) == (None, None)


@pytest.mark.parametrize("command", ["evaluate", "compare", "transfer"])
def test_the_command_line_ends_with_code_2(command: str, tmp_path) -> None:
    words = [command, "streaming_llm", "--budgets", "16", "--samples", "2", "--no-check"]
    words += ["--models" if command == "transfer" else "--model", "zoo-gpt2"]
    words += ["--tasks" if command == "transfer" else "--task", "zoo_needle:length=1400"]
    done = CliRunner().invoke(app, [word for word in words if command != "evaluate" or word != "--no-check"])
    assert done.exit_code == 2, done.output
    assert "zoo_needle/sealed/0/0" in done.output
    assert "positions for 1,152 tokens" in " ".join(done.output.split())


# ---- attach ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["streaming_llm(budget=8, every=5)", "full"])
def test_generate_stops_at_the_end_of_the_table(gpt2: LoadedModel, spec: str) -> None:
    model, ids = gpt2.model, torch.arange(6, 26)[None]
    more = {"do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), manager_of(spec).attach(model) as cache:
        said = model.generate(ids, past_key_values=cache, max_new_tokens=LIMIT - 20 + 1, **more)
        assert said.shape[1] == LIMIT + 1  # the last one was not read
    said = r"token 65 .* evicted tokens count; give a shorter text, a smaller max_new_tokens"
    with pytest.raises(ModelError, match=said), torch.no_grad(), manager_of(spec).attach(model) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=LIMIT, **more)
    for long in ({"input_ids": torch.ones(1, 65, dtype=torch.int64)}, {"inputs_embeds": torch.zeros(1, 65, 64)}):
        with pytest.raises(ModelError, match="token 65"), manager_of(spec).attach(model) as cache:
            model(**long, past_key_values=cache)
    # Padding takes no position where the model is told of it, and afterwards the model is as it was.
    mask = (torch.arange(70) >= 10).long()[None]
    with torch.no_grad(), manager_of(spec).attach(model) as cache:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = torch.ones(1, 70, dtype=torch.int64)
        model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert not model.base_model._forward_pre_hooks
    with pytest.raises(IndexError):
        model(torch.ones(1, 65, dtype=torch.int64))


def test_rotary_models_warn_once_where_they_are_attached() -> None:
    loaded, manager = small("llama"), manager_of("keydiff(budget=8)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), manager.attach(loaded.model) as cache:
            loaded.model(torch.ones(1, LIMIT, dtype=torch.int64), past_key_values=cache)
            assert not [one for one in caught if "evomem" in str(one.message)]
            for _ in range(3):
                loaded.model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    said = [str(one.message) for one in caught if "evomem" in str(one.message)]
    assert len(said) == 1
    assert "was made for 64 positions" in said[0]


def test_the_decision_transformers_limit_is_its_timesteps() -> None:
    sample = Sample("tmaze/sealed/0/0", "r0 s0 a0 " * 5, " r0 s0", " a0", ("a0",), 1)
    config = DecisionStreamConfig(max_ep_len=5, state_dim=1, act_dim=2, hidden_size=32, n_head=1)
    loaded = LoadedModel("dt", DecisionStream(config), stream_tokenizer(config), "")
    with pytest.raises(TaskError, match="positions for 15 tokens"):
        Evaluator(loaded).tokens(sample)
    fits = Evaluator(loaded).tokens(Sample("x", "r0 s0 a0 " * 4, " r0 s0", " a0", (), 1))
    assert fits.read.shape[1] == 12
