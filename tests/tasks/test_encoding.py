"""What is measured is what is deployed: the ids of ``tokenizer(text)``, and of ``apply_chat_template`` for chats."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evomem.errors import ConfigError, RunError, TaskError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.compare import NamedManager, Scenario, compare
from evomem.evaluation.likelihood import mean_loglik
from evomem.evaluation.measurement import EXACT
from evomem.evaluation.store import PrefillStore
from evomem.evaluation.traces.recording import record
from evomem.managers import build as manager_of
from evomem.models import LoadedModel
from evomem.report.tables import notes
from evomem.runs.bench import _bench_of
from evomem.tasks import Split, build
from evomem.tasks.base import Sample
from evomem.tasks.chat import ChatTemplate
from evomem.tasks.encoding import TextEncoder
from evomem.testing.models import tiny, tiny_tokenizer
from tests.support.toy_tokenizer import ToyTokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<unk>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<unk>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (m['content'] | trim) + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SAMPLE = Sample(
    "toy/sealed/0",
    "the special magic number for cat is : 1 2 3 . the grass is green . the sky is blue . here we go .",
    "\nwhat is the number for cat ? the number for cat is",
    " 1 2 3",
    ("1 2 3",),
    4,
)
BEGUN = " the number for cat is"


class Toy:
    """A task of one sample."""

    name, uniform_chance, has_exact = "toy", 0.0, True

    def samples(self, split, n, seed):
        return [replace(SAMPLE, id=f"toy/{split}/{k}") for k in range(n)]

    def score(self, sample, output):
        return float(output.split() == sample.references[0].split())

    def describe(self):
        return {}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A model whose tokenizer puts a token before every text, and one behind it."""
    return LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(around="<s> $A </s>"), "digest")


# ---- the tokenizer's prefix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("around", "prefix"),
    [("$A", ()), ("<s> $A", (1,)), ("$A </s>", ()), ("<s> $A </s>", (1,)), ("<s> <s> $A", (1, 1)), ("<unk> $A", (3,))],
)
def test_the_prefix_and_only_the_prefix(around: str, prefix: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer(around=around)
    encoder = TextEncoder(tokenizer)
    assert encoder.prefix == prefix
    suffix = around.split("$A")[1].split()
    whole = tokenizer(SAMPLE.context).input_ids
    assert encoder.beginning(SAMPLE.context) == whole[: len(whole) - len(suffix)]
    assert encoder.following(SAMPLE.question) == tokenizer.encode(SAMPLE.question, add_special_tokens=False)
    assert encoder.beginning("<s><s> the cat").count(1) == 2  # a text that has one gets no second one
    assert TextEncoder(ToyTokenizer()).prefix == (0,)


def test_text_that_goes_on_has_no_blank_of_its_own() -> None:
    """SentencePiece's tokenizers put a blank before every text; a question and an answer must not get one."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [SAMPLE.context + SAMPLE.question + SAMPLE.answer]
    words.train_from_iterator(letters, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"]))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    encoder = TextEncoder(tokenizer)
    spelled = tokenizer.convert_ids_to_tokens(encoder.context(SAMPLE))
    for text in (SAMPLE.question, SAMPLE.answer, "cat"):
        spelled += tokenizer.convert_ids_to_tokens(encoder.following(text))
    joined = f"{SAMPLE.context}{SAMPLE.question}{SAMPLE.answer}cat"
    assert "".join(spelled) == "".join(tokenizer.convert_ids_to_tokens(tokenizer(joined).input_ids))
    assert "".join(spelled) == "<s>▁" + joined.replace(" ", "▁")


@pytest.mark.parametrize("mode", ["query_agnostic", "query_aware"])
@pytest.mark.parametrize("spec", ["keydiff(budget=9)", "h2o(budget=7)", "full"])
def test_what_is_measured_is_what_attach_and_generate_do(loaded: LoadedModel, spec: str, mode: str) -> None:
    model, tokenizer, manager = loaded.model, loaded.tokenizer, manager_of(spec)
    evaluator = Evaluator(loaded, EvaluationProtocol(mode=mode))
    fast = evaluator.evaluate([manager], SAMPLE, Toy(), EXACT)[0]
    texts: list[str] = []
    task = SimpleNamespace(has_exact=True, score=lambda sample, output: texts.append(output) or 0.0)
    plain = evaluator.evaluate_plainly(manager, SAMPLE, task, EXACT)
    # What a user writes; the suffix is what he must leave off to go on with the text.
    whole = tokenizer(SAMPLE.context + SAMPLE.question, return_tensors="pt").input_ids[:, :-1]
    length = len(tokenizer(SAMPLE.context).input_ids) - 1 if mode == "query_agnostic" else whole.shape[1] - 1
    answer = torch.tensor(tokenizer(SAMPLE.answer).input_ids[1:-1])
    with torch.no_grad(), manager.attach(model) as cache:
        with cache.reading():
            model(whole[:, :length], past_key_values=cache)
        said = model.generate(whole, past_key_values=cache.clone(), max_new_tokens=4, do_sample=False)
        rest = torch.cat((whole[0, length:], answer[:-1]))[None]
        logits = model(rest, past_key_values=cache).logits[0, -len(answer) :].log_softmax(-1)
    loglik = float(logits.gather(1, answer[:, None]).mean())
    assert whole[0, 0] == 1
    assert int((whole == 1).sum()) == 1
    assert fast.loglik == pytest.approx(loglik, abs=1e-5)
    assert plain.loglik == pytest.approx(loglik, abs=1e-5)
    assert texts == [tokenizer.decode(said[0, whole.shape[1] :], skip_special_tokens=True)]
    assert fast.tokens == whole.shape[1] + len(answer) - 1 + (whole.shape[1] - length) + 3


def test_without_context_the_question_is_the_beginning(loaded: LoadedModel) -> None:
    question = loaded.tokenizer(SAMPLE.question).input_ids[:-1]
    answer = torch.tensor(loaded.tokenizer(SAMPLE.answer).input_ids[1:-1])
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*question, *answer[:-1].tolist()]])).logits[0, len(question) - 1 :]
    wanted = float(logits.log_softmax(-1).gather(1, answer[:, None]).mean())
    assert Evaluator(loaded).loglik_without_context(SAMPLE) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(TaskError, match="context has no token"):
        Evaluator(loaded).tokens(replace(SAMPLE, context=""))


@pytest.mark.parametrize(
    "spec", ["multikey_1:length=200", "passkey:length=150", "book:length=200", "zoo_needle:length=90"]
)
def test_the_prefix_counts_in_the_length(smollm2: LoadedModel, spec: str) -> None:
    """The same needles in as much hay as is left; without a prefix everything is as it was."""
    plain = smollm2.tokenizer
    other = type(plain).from_pretrained(plain.name_or_path)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert TextEncoder(plain).prefix == ()
    for sample, begun in zip(*(build(spec, t).samples(Split.SELECT, 3, 0) for t in (plain, other)), strict=True):
        mine, theirs = (Evaluator(replace(smollm2, tokenizer=t)).tokens for t in (plain, other))
        apart = [plain.encode(text, add_special_tokens=False) for text in (sample.context, sample.question)]
        assert [mine(sample).read[0].tolist(), mine(sample).prompt[0].tolist()] == apart
        read = theirs(begun).read[0].tolist()
        assert read == other(begun.context).input_ids
        total = sum(part.shape[1] for part in vars(theirs(begun)).values())
        assert total <= build(spec, other).options.length
        assert sample.answer == begun.answer
        assert sample.meta["units"] - 1 <= begun.meta["units"] <= sample.meta["units"]


def test_the_prefix_is_in_rows_provenance_and_traces(loaded: LoadedModel, tmp_path) -> None:
    found = {}
    for name, one in {"with": loaded, "without": replace(loaded, tokenizer=tiny_tokenizer())}.items():
        protocol = EvaluationProtocol()
        config = SimpleNamespace(protocol=protocol, protocol_on=lambda model, p=protocol: p, traces=[], plan=lambda: ())
        place = Scenario("tiny", "toy", Evaluator(one, store=PrefillStore()), Toy())
        keep = tmp_path / f"{name}.jsonl"
        rows = compare([NamedManager("full", manager_of("full"))], [place], samples=2, against=[], keep=keep).rows
        record(one, Toy(), "toy", tmp_path / name, samples=1)
        header = json.loads((tmp_path / name / "manifest.json").read_text())["header"]
        found[name] = [rows[0].prefix, _bench_of(config, one, PrefillStore()).provenance.get("prefix", "")]
        found[name] += [header["prefix"], " ".join(notes(rows)).partition("stands ")[2].partition(",")[0]]
    assert found == {"with": ["<s>"] * 4, "without": [""] * 4}
    with pytest.raises(ConfigError, match="another comparison"):
        compare(
            [NamedManager("full", manager_of("full"))], [place], samples=2, against=[], keep=tmp_path / "with.jsonl"
        )
    with pytest.raises(RunError, match="prefix"):
        record(loaded, Toy(), "toy", tmp_path / "without", samples=1)


# ---- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["", BEGUN])
@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_a_chat_has_the_ids_of_apply_chat_template(template: str, begun: str) -> None:
    tokenizer = tiny_tokenizer(around="<s> $A", chat_template=template)
    chat, encoder = ChatTemplate(tokenizer, "toy"), TextEncoder(tokenizer)
    sample = chat.with_id_check(chat.as_turn(replace(SAMPLE, context=f" {SAMPLE.context}"), begun))
    parts = [encoder.context(sample), encoder.following(sample.question), encoder.following(sample.answer)]
    user = f" {SAMPLE.context}{SAMPLE.question.removesuffix(begun)}"
    reply = f"{begun}{SAMPLE.answer}".lstrip()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True)["input_ids"]
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    whole = tokenizer.apply_chat_template(turns, continue_final_message=True)["input_ids"]
    assert [*parts[0], *parts[1], *parts[2]] == whole
    assert [*parts[0], *parts[1]][: len(asked)] == asked
    assert begun or [*parts[0], *parts[1]] == asked
    assert whole.count(1) == 1  # the template brings its own token for the beginning, and no second one comes
    assert sample.meta["same_ids"]
    assert chat.size(sample) == len(whole)
    # Tokens that would straddle two parts are told of.
    glued = chat.as_turn(replace(SAMPLE, context="the sp", question="ecial cat"))
    assert not chat.with_id_check(glued).meta["same_ids"]


@pytest.mark.parametrize("mode", ["query_agnostic", "query_aware"])
def test_a_chat_is_read_as_it_is_deployed(mode: str) -> None:
    tokenizer = tiny_tokenizer(around="<s> $A", chat_template=CHATML)
    loaded = LoadedModel("tiny", tiny("llama", layers=2), tokenizer, "digest")
    evaluator, manager = Evaluator(loaded, EvaluationProtocol(mode=mode)), manager_of("keydiff(budget=9)")
    chat = ChatTemplate(tokenizer, "toy")
    sample = chat.as_turn(SAMPLE, BEGUN)
    texts: list[str] = []
    task = SimpleNamespace(has_exact=True, score=lambda sample, output: texts.append(output) or 0.0)
    evaluator.evaluate_plainly(manager, sample, task, EXACT)
    turns = [{"role": "user", "content": SAMPLE.context + SAMPLE.question.removesuffix(BEGUN)}]
    turns.append({"role": "assistant", "content": BEGUN.strip()})
    ids = tokenizer.apply_chat_template(turns, continue_final_message=True, return_tensors="pt")["input_ids"]
    read = ids.shape[1] - 1
    if mode == "query_agnostic":
        read = len(tokenizer(chat.head + SAMPLE.context, add_special_tokens=False).input_ids)
    with torch.no_grad(), manager.attach(loaded.model) as cache:
        with cache.reading():
            loaded.model(ids[:, :read], past_key_values=cache)
        said = loaded.model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert texts == [tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)]
    asked = evaluator.without_context(sample)[0][0].tolist()
    assert asked == tokenizer(chat.head + sample.question, add_special_tokens=False).input_ids


@pytest.mark.parametrize("spec", ["multikey_1:length=220", "passkey:length=200", "single_3:length=200"])
def test_tasks_ask_in_the_template_of_a_real_model(smollm2: LoadedModel, spec: str) -> None:
    tokenizer, evaluator = smollm2.tokenizer, Evaluator(smollm2)
    plain, chats = build(spec, tokenizer), build(f"{spec},chat_template=true", tokenizer)
    assert chats.describe() == {**plain.describe(), "chat_template": True}
    pairs = zip(*(task.samples(Split.SELECT, 3, 0) for task in (plain, chats)), strict=True)
    for sample, chat in pairs:
        assert chat.id == sample.id
        assert (chat.references, chat.answer) == (sample.references, sample.answer)
        tokens = evaluator.tokens(chat)
        ids = torch.cat((tokens.read, tokens.prompt, tokens.answer), 1)[0].tolist()
        text = tokenizer.decode(ids)
        user, _, reply = text.partition("<|im_start|>user\n")[2].partition("<|im_end|>\n<|im_start|>assistant\n")
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        assert tokenizer.apply_chat_template(turns, continue_final_message=True)["input_ids"] == ids
        assert user.startswith(sample.context[:60])
        assert user.endswith("?")
        assert chat.meta["same_ids"]
        assert chats.options.length - 60 < len(ids) <= chats.options.length


def test_own_questions_as_chats(tmp_path) -> None:
    path = tmp_path / "own.jsonl"
    row = {"context": "the cat is red . " * 30, "question": "what is red ?", "answers": ["the cat"], "split": "train"}
    path.write_text(json.dumps(row))
    tokenizer = tiny_tokenizer(around="<s> $A", chat_template=CHATML)
    (sample,) = build(f"file:{path},length=60,chat_template=true", tokenizer).samples(Split.TRAIN, 1, 0)
    tokens = Evaluator(LoadedModel("tiny", tiny("llama", layers=1), tokenizer, "")).tokens(sample)
    assert 57 < sum(part.shape[1] for part in vars(tokens).values()) <= 60
    assert sample.question.endswith("<unk>assistant\n")
    assert sample.answer == "the cat"


def test_what_is_refused(tmp_path, smollm2: LoadedModel) -> None:
    for tokenizer in (tiny_tokenizer(), ToyTokenizer()):
        with pytest.raises(ConfigError, match="no chat template; leave the option out"):
            build("passkey", tokenizer, chat_template=True)
    for template, message in {
        "{{ messages[0]['content'] }}{{ messages[0]['content'] }}": "2 times",
        "{{ raise_exception('only tools') }}": "only tools",
        "{{ messages[0]['content": "cannot be applied",
    }.items():
        with pytest.raises(ConfigError, match=message):
            ChatTemplate(tiny_tokenizer(chat_template=template), "toy")
    shouting = ChatTemplate(tiny_tokenizer(chat_template="{{ messages[0]['content'] | replace('cat', 'dog') }}"), "toy")
    with pytest.raises(TaskError, match="changes the text"):
        shouting.as_turn(SAMPLE)
    with pytest.raises(ConfigError, match="no option 'chat_template'"):
        build("book", smollm2.tokenizer, chat_template=True)


def test_a_template_that_writes_the_date_says_the_same_tomorrow() -> None:
    dated = "{{ strftime_now('%d %b %Y') + '\n' + messages[0]['content'] }}"
    head = ChatTemplate(tiny_tokenizer(chat_template=dated), "toy").head
    assert head == "26 Jul 2024\n"
    with pytest.raises(ConfigError, match="today's date"):
        ChatTemplate(tiny_tokenizer(chat_template="{% set f = '%d' %}{{ strftime_now(f) }}"), "toy")


def test_rows_of_likelihood_only_among_others(loaded: LoadedModel) -> None:
    """They are not generated for, and have no exact score; and the mean of no answer is no number."""

    class Mixed(Toy):
        def score(self, sample, output):
            raise AssertionError("this row has no exact metric")

    evaluator, sample = Evaluator(loaded), replace(SAMPLE, max_new_tokens=0)
    manager = manager_of("full")
    assert evaluator.evaluate([manager], sample, Mixed(), EXACT)[0].exact is None
    assert evaluator.evaluate_plainly(manager, sample, Mixed(), EXACT).exact is None
    with pytest.raises(TaskError, match="no token"):
        mean_loglik(torch.zeros(1, 0, 128), torch.zeros(1, 0, dtype=torch.int64))
