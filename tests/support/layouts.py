"""Layouts of heads of different lengths, as hypothesis draws them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from evomem.memory.kv.ragged import RaggedLayout


def layouts() -> st.SearchStrategy[RaggedLayout]:
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
    lengths = sizes.flatmap(
        lambda size: st.lists(st.lists(st.integers(0, 9), min_size=size[1], max_size=size[1]), min_size=size[0],
                              max_size=size[0])
    )  # fmt: skip
    return lengths.map(lambda rows: RaggedLayout(torch.tensor(rows), torch.device("cpu")))
