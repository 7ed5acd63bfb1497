"""The shipped Titans: what their recipes say, tasks solved far beyond the trained length, and by the memory."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

import evomem.models
from evomem.models.aliases import aliases
from evomem.models.architectures.titans import Variant
from evomem.models.pretrained.files import sha256
from evomem.tasks import Split, build
from experiments.titans_texts import TOKENIZER

NAMES = [f"zoo-titans-{variant}" for variant in get_args(Variant)]


@torch.no_grad()
def right(loaded, sample, *, emptied=False):
    """Whether the model's next word after a sample's question is the answer; ``emptied``: its memory is, before it."""
    context, question = (
        loaded.tokenizer(text, return_tensors="pt").input_ids for text in (sample.context, sample.question)
    )
    cache = None if emptied else loaded.model(context).past_key_values
    said = loaded.model(question, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()
    return loaded.tokenizer.decode(said) == sample.references[0].split()[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_its_recipe_s_and_recalls_by_its_memory(name):
    folder = aliases[name].source()
    record, weights = json.loads((folder / "recipe.json").read_text()), folder / "model.safetensors"
    assert weights.stat().st_size <= 1e6
    assert sha256(weights) == record["sha256"]
    assert name == f"zoo-titans-{record['row']}"
    loaded = evomem.models.load(name)
    assert loaded.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.model.config.variant == record["row"]
    task, count = build("zoo_recall:length=512,pairs=6", loaded.tokenizer), 12
    samples = task.samples(Split.SEALED, count, seed=7)
    assert sum(right(loaded, sample) for sample in samples) >= count - 2
    assert sum(right(loaded, sample, emptied=True) for sample in samples) <= 3
