"""The table of model families: how a family is tried, and that neither a crash nor a hang stops the rest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from evomem.testing import families
from evomem.testing.families import Verdict, main, model_types, page, small, try_family, verdicts

ROOT = Path(__file__).resolve().parents[2]


def test_tiny_configurations_are_longer_than_their_windows_and_choose_no_experts() -> None:
    mixtral = small("mixtral")
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (2, 2)
    assert mixtral.eos_token_id is None
    gemma = small("gemma3_text")
    assert gemma.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert gemma.sliding_window == 6
    assert small("bert").is_decoder


def test_a_family_is_refused_with_its_reason_or_could_not_be_built() -> None:
    assert try_family("doge") == Verdict("doge", "DogeForCausalLM", "refused", families.try_family("doge").why)
    assert "values of all tokens" in try_family("doge").why
    assert try_family("musicgen").status == "not tried"


def test_what_passes_the_first_look_and_fails_the_kit_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no\nway")

    monkeypatch.setattr(families, "run_check", fail)
    verdict = try_family("llama")
    assert verdict.status == "differs"
    assert verdict.why.startswith("float32, h2o(budget=14, every=16), keep_everything: RuntimeError: no way")


def test_neither_a_crash_nor_a_hang_stops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    started, closed = [], []

    class Worker:
        def __init__(self) -> None:
            started.append(self)

        def ask(self, model_type: str, seconds: float) -> Verdict | str:
            return f"it died ({seconds:.0f})" if model_type == "bad" else Verdict(model_type, "X", "conforms")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(families, "_Worker", Worker)
    found = list(verdicts(["a", "bad", "b", "bad"], 9))
    assert [(v.type, v.status) for v in found] == [
        ("a", "conforms"), ("bad", "not tried"), ("b", "conforms"), ("bad", "not tried")
    ]  # fmt: skip
    assert found[1].why == "it died (9)"
    assert len(started) == len(closed) == 2


def test_a_process_that_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families.sys, "executable", "/bin/false")
    worker = families._Worker()
    assert "exit code" in str(worker.ask("llama", 20))
    worker.close()


def test_the_page_counts_and_main_tells_when_one_differs(monkeypatch, tmp_path, capsys) -> None:
    made = [
        Verdict("a", "A", "conforms"),
        Verdict("b", "B", "refused", "x | y"),
        Verdict("c", "C", "differs", "logits"),
    ]
    text = page(made, "5.0")
    assert "**1 of the 3 decoders of transformers 5.0 conform**; 1 are refused" in text
    assert "1 are accepted and fail the kit." in text
    assert "| `b` | B | refused | x / y |" in text
    monkeypatch.setattr(families, "verdicts", lambda types, seconds: iter(made))
    out = tmp_path / "families.md"
    assert main(["llama", "--out", str(out)]) == 1
    assert out.read_text() == page(made, families_version())
    assert "3/1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["no-such-type"])


def families_version() -> str:
    import transformers

    return transformers.__version__


def test_the_page_in_the_docs_is_whole_and_readme_says_its_number() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| .*? \| ([a-z ]+) \|", text, re.MULTILINE)
    if f"transformers {families_version()} " in text:
        assert [name for name, _ in rows] == model_types()
    count = Counter(status for _, status in rows)
    assert f"**{count['conforms']} of the {len(rows)} decoders" in text
    assert not count["differs"]
    assert f"{count['conforms']} families" in (ROOT / "README.md").read_text()
