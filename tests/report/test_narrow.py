"""Report: on a narrow terminal names go on in the next line, and every number is there whole."""

from __future__ import annotations

import re

import pytest

from evomem.evaluation.rows import rows_of
from evomem.report.tables import markdown, tables
from evomem.terminal import plain_console
from tests.report.test_price import measured

NAMES = ("docs/results/plugins/one_of_a_long_name_1", "keydiff(allocation=probe_shares(probe=retrieval, power=0.75))")


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_of_a_table_is_cut(width, capsys):
    lone = [-0.1 - 0.01 * i for i in range(24)]
    rows = rows_of(
        NAMES[0],
        [
            measured(NAMES[0], "subject", 32, lone, 1.9e6, [5000.0 + 100 * i for i in range(24)]),
            measured(NAMES[1], "field", 32, [value * 7 for value in lone], 1.9e6),
            measured("full", "full", None, lone, 9e6),
        ],
    )
    console = plain_console(width=width)
    for table in tables(rows):
        console.print(table)
    printed = capsys.readouterr().out
    assert "…" not in printed
    words = set(re.split(r"[^-+.,\d]+", printed))
    for row in rows:
        assert {f"{row.loglik:.3f}", f"{row.bytes_mean / 1024:,.0f}"} <= words
    assert (NAMES[0] in printed) == (width == 140)
    assert all(name in markdown(rows) for name in NAMES)
