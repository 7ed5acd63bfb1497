"""Report: tables, columns and pictures of what every layer and KV head holds."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import evomem
from evomem.errors import ConfigError
from evomem.evaluation.rows import Row
from evomem.models import LoadedModel
from evomem.report import heads as module
from evomem.report import plots
from evomem.report.heads import alike, head_notes, head_plot, head_tables
from evomem.report.pictures import draw_comparison
from evomem.report.tables import markdown, notes
from evomem.testing.models import tiny, tiny_tokenizer

LAYERS, HEADS = 4, 3


def row(manager, budget, slots, role="field", task="t"):
    slots = np.broadcast_to(np.asarray(slots, float), (LAYERS, HEADS)).tolist() if slots is not None else None
    return Row(
        model="m", task=task, manager=manager, budget=budget, protocol="p", split="sealed", role=role, samples=9,
        score=None, loglik=-1.0, bytes_peak=9.0, bytes_mean=9.0, slots=9.0, seconds=1.0, head_slots=slots,
        head_bytes=None if slots is None else (100 * np.asarray(slots)).tolist(),
    )  # fmt: skip


UNEVEN = 2.0 ** np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS)


@pytest.fixture
def rows():
    return [
        row("mine", 8, UNEVEN, "subject"),
        row("keydiff", 8, 8),
        row("h2o", 8, 8),
        row("mine", 16, 2 * UNEVEN, "subject"),
        row("keydiff", 16, 16),
        row("full", None, 500, "full"),
    ]


def text(table):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_managers_that_hold_the_same_stand_together_and_nothing_is_lost(rows):
    groups = alike(rows)
    assert [(one.budget, one.managers) for one in groups] == [
        (8, ("mine",)), (8, ("keydiff", "h2o")), (16, ("mine",)), (16, ("keydiff",)), (None, ("full",)),
    ]  # fmt: skip
    assert [one.total_slots for one in groups] == [2**12 - 1, 96, 2**13 - 2, 192, 6000]
    assert all(one.total_bytes == 100 * one.total_slots for one in groups)
    share, count = alike([row("keydiff", 1.0, 8), row("keydiff", 1, 8)])
    assert (type(share.budget), type(count.budget)) == (float, int)


def test_a_table_tells_least_mean_and_most_of_every_layer_and_the_totals(rows):
    first, second, last = map(text, head_tables(rows))
    lines = first.splitlines()
    for layer in range(LAYERS):
        least, mean, most = UNEVEN[layer].min(), UNEVEN[layer].mean(), UNEVEN[layer].max()
        (line,) = (one for one in lines if one.strip("│┃ ").split(" ")[0] == str(layer))
        assert f"{least:.0f} / {mean:.0f} / {most:.0f}" in line
        assert f" {8 * HEADS * 100 / 1024:,.0f} " in line
    (total,) = (one for one in lines if "total" in one)
    assert "4,095" in total
    assert f"{409500 / 1024:,.0f}" in total
    assert "h2o" in first
    assert "h2o" not in second
    assert "6,000" in last
    assert "0-3" in last  # layers that hold the same


def test_names_that_differ_at_their_end_only_are_told_whole_in_a_narrow_terminal():
    names = [f"snapkv(allocation={one})" for one in ("lava", "razor", "pyramid", "cake", "duo", "headkv")]
    (table,) = head_tables([row(name, 8, 8 + UNEVEN * place) for place, name in enumerate(names)])
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table)
    told = capture.get()
    assert "…" not in told
    header = [line.split("┃") for line in told.splitlines() if line.startswith("┃")]
    assert ["".join(line[at].strip() for line in header) for at in range(2, 14, 2)] == names


def test_the_note_says_which_budget_the_full_cache_is_set_against(rows):
    told = [replace(one, difference=None if one.role == "subject" else 0.1) for one in rows]
    assert any("over the row (full: at its largest budget)" in note for note in notes(told))
    assert not any("largest budget" in note for note in notes([one for one in told if one.budget != 16]))


def test_columns_of_the_comparison_tell_the_range_and_the_total(rows):
    told = markdown(rows)
    assert "| slots | min-max | total | KiB |" in told
    assert "| 1-2048 | 4,095 |" in told
    assert "| 8 | 96 |" in told
    even = markdown([one for one in rows if one.manager != "mine"])
    assert "min-max" not in even
    assert "| slots | total | KiB |" in even
    old = markdown([replace(one, head_slots=None, head_bytes=None) for one in rows])
    assert "total" not in old
    assert "| slots | KiB |" in old


def test_what_was_not_measured_by_head_is_named(rows):
    some = [*rows, row("tova", 8, None)]
    assert any("Not measured by head: tova." in note for note in head_notes(some))
    assert not any("Not measured" in note for note in head_notes(rows))
    assert len(head_tables(some)) == len(head_tables(rows))


def test_the_note_and_the_colour_are_those_of_the_subject_that_differences_are_of(rows):
    other = replace(row("best", 8, 8, "subject"), loglik=-0.5, difference=-0.5)
    some = [other, rows[0], *(replace(one, difference=0.1) for one in rows[1:3])]
    assert any("advantage: of mine over" in note for note in notes(some))
    assert next(iter(plots._named(some))) == "mine"


def drawn(monkeypatch, path, rows):
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, _: figures.append(figure))
    assert head_plot(path, rows, "a title that is wider than two panels " * 3)
    (figure,) = figures
    return [axes for axes in figure.axes if axes.images], figure.axes[-1]


def test_a_heat_map_has_a_panel_each_in_one_scale(monkeypatch, tmp_path, rows):
    zero = UNEVEN.copy()
    zero[0, 0] = 0
    panels, bar = drawn(monkeypatch, tmp_path / "h.png", [*rows[:3], row("gone", 8, zero), *rows[3:]])
    titles = [axes.get_title() for axes in panels]
    assert [title.split("\n")[0] for title in titles] == ["mine", "keydiff", "gone", "mine", "keydiff"]
    assert not any("full" in title for title in titles)
    assert "h2o" in titles[1]
    pictures = [np.ma.filled(axes.images[0].get_array(), 0) for axes in panels]
    for shown, expected in zip(pictures, (UNEVEN, 8, zero, 2 * UNEVEN, 16), strict=True):
        assert np.array_equal(shown, np.broadcast_to(expected, (LAYERS, HEADS)))
    assert {(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in panels} == {(1.0, 2.0 * 2**11)}
    assert panels[0].get_xlabel() == "KV head"
    figure = panels[0].figure
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert panels[0].get_ylabel() == "layer"
    assert "slots" in bar.get_ylabel()
    assert "grey: none" in bar.get_ylabel()


def test_panels_of_every_budget_are_in_one_order_and_a_single_budget_in_the_tables(monkeypatch, tmp_path):
    """Rows come the best first, which is another manager at every budget."""
    names = ("mine", "keydiff", "h2o")
    best_first = [
        row(name, budget, budget + UNEVEN * (1 + names.index(name)))
        for budget, order in ((8, names), (16, names[::-1]), (32, ("keydiff", "mine", "h2o")))
        for name in order
    ]
    panels, _ = drawn(monkeypatch, tmp_path / "h.png", best_first)
    assert [axes.get_title().split("\n")[0] for axes in panels] == [*names] * 3
    for number, axes in enumerate(panels):
        budget, slots = 8 << number // 3, UNEVEN * (1 + number % 3)
        assert np.array_equal(np.ma.filled(axes.images[0].get_array(), 0), budget + slots)
    panels, _ = drawn(monkeypatch, tmp_path / "h.png", best_first[3:6])
    assert [axes.get_title().split("\n")[0] for axes in panels] == [*names[::-1]]


@pytest.mark.parametrize(
    "name",
    [
        "feature_scorer(features=[recency, frequency, 'relevance:4'], sinks=0)",
        "docs/results/plugins/slots_smollm2_1(allocation=across_heads(layers=depth_shares(points=3)))",
        "slots_joint_smollm2(allocation=uniform)",
        "keydiff",
        "a name with spaces, and (brackets)",
    ],
)
def test_a_title_breaks_names_between_words(name):
    lines = module._lines(name)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert all(len(line) <= module._WIDE for line in lines)
    words = set(re.findall(r"[\w.]+", name))
    assert all(set(re.findall(r"[\w.]+", line)) <= words for line in lines)


def test_a_word_that_no_line_holds_is_broken():
    lines = module._lines("x" * 60 + "(y)")
    assert "".join(lines) == "x" * 60 + "(y)"
    assert all(len(line) <= module._WIDE for line in lines)


def test_there_is_no_picture_of_nothing(tmp_path):
    assert not head_plot(tmp_path / "h.png", [row("full", None, 9, "full"), row("old", 8, None)], "title")
    assert not (tmp_path / "h.png").exists()


def test_every_model_and_task_has_its_pictures(tmp_path, rows):
    assert [path.name for path in draw_comparison(tmp_path / "one", rows)] == ["memory.png", "heads.png"]
    several = [*rows, *(replace(one, task="u") for one in rows if one.manager == "keydiff")]
    names = [path.name for path in draw_comparison(tmp_path / "two", several)]
    assert names == ["memory-1.png", "memory-2.png", "heads-1.png", "heads-2.png"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(names)


def test_a_comparison_measures_draws_and_keeps_heads(tmp_path):
    loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "digest")
    words = ["the", "cat", "dog", "bird", "tree", "house", "red", "black", "white", "big", "small", "sky", "blue"]
    contexts = [" ".join(np.random.default_rng(seed).choice(words, 40)) for seed in range(2)]
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"context": context, "question": " what ?", "answers": ["red cat"], "split": "sealed"})
            for context in contexts
        )
    )
    conditions = {"models": loaded, "tasks": f"file:{file}", "budgets": [8, 16], "samples": 2, "check": False}
    out, folder = tmp_path / "rows.json", tmp_path / "pictures"
    found = evomem.compare(
        ["adakv(keydiff)"], against=["keydiff"], exact=False, out=out, plots=folder, **conditions
    )  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"memory.png", "heads.png"}
    kept = {(one["manager"], one["budget"]): one for one in json.loads(out.read_text())}
    for one in found:
        assert np.mean(one.head_slots) == pytest.approx(one.slots)
        assert kept[one.manager, one.budget]["head_slots"] == one.head_slots
        budget = one.budget or max(map(max, one.head_slots))
        assert np.sum(one.head_slots) == pytest.approx(budget * np.size(one.head_slots))
    even = {one.manager: np.ptp(one.head_slots) for one in found}
    assert even["keydiff"] == even["full"] == 0 < even["adakv(keydiff)"]
    with pytest.raises(ConfigError, match=r"plots .*rows\.json: is no folder"):
        evomem.compare("keydiff", plots=out, **conditions)
    for nothing in ("", " "):
        with pytest.raises(ConfigError, match=f"plots '{nothing}': names no folder"):
            evomem.compare("keydiff", plots=nothing, **conditions)
