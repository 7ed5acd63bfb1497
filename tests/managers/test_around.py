"""Managers around another one: what they would leave out of it is refused."""

from __future__ import annotations

import pytest

from evomem.errors import ConfigError
from evomem.managers import build


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("adakv(evicted_rows(keydiff))", "does more with its decisions than to keep slots"),
        ("evicted_rows(evicted_rows(keydiff))", "does more with its decisions than to keep slots"),
        ("adakv(kv_policy(scale=model))", "needs statistics of contexts"),
        ("evicted_rows(kv_policy(scale=model))", "needs statistics of contexts"),
        ("evicted_rows(kv_policy(actions=[evict, forget]))", "it lets slots fade, and so do rows"),
    ],
)
def test_what_would_be_left_out_is_refused(spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(spec, budget=9)


def test_a_manager_around_another_forgets_and_observes_as_that_does():
    inner = build("kv_policy(actions=[evict, forget])", budget=9)
    outer = build("adakv(kv_policy(actions=[evict, forget]))", budget=9)
    assert outer.forgets
    assert outer.observes == inner.observes
    assert build("evicted_rows(adakv(keydiff))", budget=9).rule.rows == 8
