"""The table of `experiments.titans`: texts that state what they ask, how memories begin, kept trainings, refusals."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import evomem.models
from evomem.models.architectures.titans import Titans, TitansConfig
from evomem.models.pretrained.files import sha256
from evomem.tasks import Split
from evomem.tasks.splits import split_of
from evomem.tasks.text.zoo_words import DIGITS, KEYS, VALUES
from experiments import titans
from experiments.titans import (
    ABLATIONS,
    ROWS,
    SHAPE,
    begin_as_successors,
    count,
    main,
    new_model,
    parser,
    recall,
    ship,
)
from experiments.titans_texts import NEEDLES, ONCE, PAIRS, RESTATED, SHORTEST, TASKS, TOKENIZER, texts

FACTS = {"zoo_recall": PAIRS, "zoo_needle": NEEDLES, "zoo_forgetting": ONCE + RESTATED}


def words_of(drawn):
    """The words of every text, and which of them are answers."""
    return [
        (TOKENIZER.convert_ids_to_tokens(ids[real]), answers[real].tolist())
        for ids, real, answers in zip(drawn.ids, drawn.real, drawn.answers, strict=True)
    ]


def stated_in(context):
    """Values by key, the oldest first; a needle's is its four digits."""
    stated = {}
    for at, word in enumerate(context[:-1]):
        if word in KEYS and context[at + 1] in (*VALUES, *DIGITS):
            value = context[at + 1 : at + 5] if context[at + 1] in DIGITS else context[at + 1 : at + 2]
            stated.setdefault(word, []).append(value)
    return stated


@pytest.mark.parametrize("length", [SHORTEST, 64, 300])
@pytest.mark.parametrize("task", TASKS)
def test_a_text_asks_for_the_newest_value_of_all_that_it_states(task, length):
    drawn = texts(task, "a", 12, length, Split.SEALED)
    assert drawn.ids.equal(texts(task, "a", 12, length, Split.SEALED).ids)
    assert not drawn.ids.equal(texts(task, "b", 12, length, Split.SEALED).ids)
    for words, answers in words_of(drawn):
        assert length - 10 < len(words) <= length
        begin = words.index("again") if task != "zoo_needle" else len(words) - 7 * NEEDLES
        context, questions = words[:begin], words[begin:]
        stated = stated_in(context)
        assert len(stated) == FACTS[task]
        assert {key: values[-1:] for key, values in stated.items()} == stated_in(questions)
        assert sum(len(values) for values in stated.values()) == FACTS[task] + (task == "zoo_forgetting") * RESTATED
        said = [word for word, answer in zip(words, answers, strict=True) if answer]
        assert said == [word for value in stated_in(questions).values() for word in value[0]]
        facts = "; ".join(sorted(f"{key} {' '.join(value)}" for key, values in stated.items() for value in values))
        assert split_of(facts) == Split.SEALED


def test_of_keys_that_change_only_those_are_measured():
    drawn = texts("zoo_forgetting", "a", 12, 64, Split.SEALED, restated_only=True)
    for words, answers in words_of(drawn):
        stated = stated_in(words[: words.index("again")])
        asked = [before for before, (_, answer) in pairwise(zip(words, answers, strict=True)) if answer]
        assert len(asked) == RESTATED
        assert all(len(stated[key]) == 2 for key, _ in asked)


def test_recall_is_the_share_of_right_words():
    given = parser().parse_args(["--texts", "20"])

    def lookup(ids, logits_to_keep, use_cache):
        """Says of every token what stood behind it the last time, and of a new one the token itself."""
        said = ids.clone()
        for row, tokens in enumerate(ids.tolist()):
            for at, token in enumerate(tokens):
                before = [place for place in range(at) if tokens[place] == token]
                said[row, at] = tokens[before[-1] + 1] if before else token
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, len(TOKENIZER))[:, -logits_to_keep:].float())

    assert recall(lookup, "zoo_recall", 64, given) == [1.0] * 20
    assert recall(lookup, "zoo_forgetting", 64, given) == [1.0] * 20
    assert 0.2 < sum(recall(lookup, "zoo_needle", 64, given)) / 20 < 1.0  # a digit alone does not say which needle

    def constant(ids, logits_to_keep, use_cache):
        logits = torch.zeros(*ids.shape, len(TOKENIZER))
        logits[..., TOKENIZER.convert_tokens_to_ids("4")] = 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    drawn = texts("zoo_needle", "measured", 20, 64, Split.SEALED)
    fours = [sum(word == "4" for word, is_ in zip(words, a, strict=True) if is_) / 8 for words, a in words_of(drawn)]
    assert recall(constant, "zoo_needle", 64, given) == pytest.approx(fours)


def test_the_window_alone_has_as_many_parameters_as_the_largest():
    given = parser().parse_args([])
    sizes = {name: count(new_model(name, 0, given)) for name in ROWS if name not in ABLATIONS}
    largest = max(size for name, size in sizes.items() if name != titans.WINDOW)
    assert sizes[titans.WINDOW] == pytest.approx(largest, rel=0.005)


@pytest.mark.parametrize("variant", ["lmm", "mac"])
def test_a_memory_begins_with_keys_of_the_token_before(variant):
    """The key of a token points where the query of the token before it does; at a random start it points anywhere."""
    x, cosines = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)), {}
    model = new_model(variant, 0, parser().parse_args([])).requires_grad_(False)
    random = new_model("lmm-random-start", 0, parser().parse_args([])).requires_grad_(False)
    for name, one in (("begun", model), ("random", random)):
        memory = one.blocks[1].memory
        keys, queries = memory.key(x, None, None)[0], memory.query(x, None, None)[0]
        cosines[name] = torch.cosine_similarity(keys[:, 4:], queries[:, 3:-1], dim=-1)
    assert cosines["begun"].min() > 0.8 > 0.5 > cosines["random"].mean()
    begin_as_successors(random)
    assert not random.blocks[0].memory.key.linear.weight.equal(random.blocks[0].memory.value.linear.weight)


def test_mac_begins_with_a_memory_that_tells_tokens_apart():
    """At a random start attention says nearly the same of every token, and M learns that many times a segment."""
    ids = texts("zoo_recall", "a", 4, 64, Split.TRAIN).ids
    torch.manual_seed(0)
    random = Titans(TitansConfig(variant="mac", **SHAPE))
    begin_as_successors(random)
    grown = []
    for model in (random, new_model("mac", 0, parser().parse_args([]))):
        model.requires_grad_(False)
        layers = model(ids, past_key_values=model.new_cache()).past_key_values.layers
        grown.append([
            float(layer.memory.norm(dim=-1).mean() / block.memory.initial.norm())
            for layer, block in zip(layers, model.blocks, strict=True)
        ])  # fmt: skip
    assert min(grown[0]) > 5
    assert max(grown[1]) < 4


# ---- trainings -------------------------------------------------------------------------------------------------------

SMALL = f"--steps 1 --batch 2 --texts 2 --length {SHORTEST} --times 1,2 --segment 8"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["titans", *map(str, words)])
    threads = torch.get_num_threads()
    try:
        main()
    finally:
        torch.set_num_threads(threads)


def test_a_seed_gives_the_same_row_again_whatever_else_is_trained(monkeypatch, tmp_path, capsys):
    rows = {}
    for seeds, names in (("0,1", "window,lmm"), ("1", "lmm")):
        path, out = tmp_path / "new" / f"{seeds}.json", tmp_path / f"out-{seeds}"
        run(monkeypatch, *SMALL.split(), "--rows", names, "--seeds", seeds, "--json", path, "--out", out)
        rows[seeds] = json.loads(path.read_text())["rows"]
    (window, both), (alone,) = rows.values()
    assert both["loss_by_seed"][1:] == alone["loss_by_seed"]
    for task in TASKS:
        for length in (str(SHORTEST), str(2 * SHORTEST)):
            cell = both["right"][task][length]
            assert cell["by_seed"][1:] == alone["right"][task][length]["by_seed"]
            assert cell["mean"] == pytest.approx(sum(cell["by_seed"]) / 2)
            difference = cell["mean"] - window["right"][task][length]["mean"]
            assert cell["minus_window"]["mean"] == pytest.approx(difference, abs=1e-3)
    assert f"| zoo_needle | parameters | {SHORTEST} | {2 * SHORTEST} |" in capsys.readouterr().out


def test_a_training_is_kept_and_can_be_shipped(monkeypatch, tmp_path):
    words = [*SMALL.split(), "--rows", "lmm", "--out", tmp_path / "out"]
    run(monkeypatch, *words, "--json", tmp_path / "first.json")
    monkeypatch.setattr(titans, "train", None)  # it would have to be called
    run(monkeypatch, *words, "--json", tmp_path / "again.json", "--read-segments", "8,3")
    (first,), (again,) = (json.loads((tmp_path / f"{one}.json").read_text())["rows"] for one in ("first", "again"))
    by_segment = again.pop("right_by_segment")
    assert first == again
    for task in TASKS:
        cell = first["right"][task][str(SHORTEST)]
        assert by_segment["8"][task] == {key: cell[key] for key in ("mean", "interval", "by_seed")}
    assert by_segment.keys() == {"8", "3"}
    with pytest.raises(SystemExit, match="other settings"):
        run(monkeypatch, *words, "--steps", "2")
    folder = ship("lmm", parser().parse_args(list(map(str, words))), tmp_path)
    loaded = evomem.models.load(str(folder))
    kept = evomem.models.load(str(tmp_path / "out" / "lmm-0"))
    ids = loaded.tokenizer("magic fox 4 7 1 3.", return_tensors="pt").input_ids
    assert loaded.model(ids).logits.equal(kept.model(ids).logits)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["row"] == "lmm"
    assert recipe["sha256"] == sha256(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows lmm,rnn", "lmm, mac, mag, mal, window"),
        ("--rows lmm,lmm", "none twice"),
        ("--seeds 0,x", "at least 0"),
        ("--seeds 1,1", "none twice"),
        ("--times 0", "at least 1"),
        ("--texts 1", "at least 2"),
        ("--steps 0", "counts"),
        ("--length 51", f"at least {SHORTEST}"),
        ("--rate nan", "above 0"),
        ("--segment 0", "--segment are counts"),
        ("--ship --rows window", "not for the zoo"),
        ("--rows lmm,mac --read-segments 1", "sees its segment"),
        ("--rows lmm --read-segments 0", "at least 1"),
    ],
)
def test_what_is_no_training_is_refused_before_it(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *words.split())
    assert message in f"{refused.value} {capsys.readouterr().err}"
