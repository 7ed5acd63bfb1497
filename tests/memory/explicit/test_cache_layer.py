"""What transformers calls on a layer of a memory of its own: the same answers and refusals in every kind."""

from __future__ import annotations

import pytest
import torch

from evomem.errors import CacheError
from evomem.managers import build
from evomem.memory.explicit import PairMemory
from evomem.memory.explicit.feedback import FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots
from evomem.memory.explicit.matrix import MatrixLayer
from evomem.memory.explicit.matrix_rows import MatrixRows
from evomem.memory.explicit.neural import NeuralLayer
from evomem.models.architectures.memory_matrix import MemoryMatrix, MemoryMatrixConfig
from evomem.models.architectures.mosaic_cache import UnitMemory
from evomem.models.architectures.mosaic_decided import DecidedPairs


@pytest.mark.parametrize(
    "kind",
    [PairMemory, MatrixLayer, MatrixRows, NeuralLayer, UnitMemory, DecidedPairs, FeedbackLayer, FeedbackSlots],
)
def test_every_memory_answers_and_refuses_alike(kind):
    layer = kind()
    layer.seen = 5
    assert layer.get_seq_length() == 5
    assert layer.get_mask_sizes(3) == (8, 0)
    assert layer.get_max_length() == -1
    assert not layer.is_croppable
    layer.lazy_initialization(torch.zeros(1), torch.zeros(1))
    for all_of_it in (0, 5, 9):
        layer.crop(all_of_it)
    for fewer in (-1, 4):
        with pytest.raises(CacheError, match=f"{kind.title} cannot take tokens back.*deepcopy"):
            layer.crop(fewer)
    with pytest.raises(CacheError, match=f"{kind.title} was given the keys and values of another model's attention"):
        layer.update(torch.zeros(1), torch.zeros(1))


def test_a_pass_that_a_decision_ended_is_not_gone_on_from(monkeypatch):
    """All layers have read as much then, so only the cache itself can know."""
    model = MemoryMatrix(MemoryMatrixConfig(hidden_size=16, matrix_slots=3, matrix_width=4)).eval()
    cache, ids = model.decided_cache(build("knorm(budget=3,every=2)")), torch.arange(5)[None]
    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "decide", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
    for refused in (lambda: model(ids, past_key_values=cache), cache.state):
        with pytest.raises(CacheError, match="cut short"):
            refused()
    cache.reset()
    model(ids, past_key_values=cache)
    assert len(cache.state()[0]) == 2
