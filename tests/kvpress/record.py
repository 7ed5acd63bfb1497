"""What evomem's own caches keep, written down for the environment in which they do not run: ``record.py FOLDER``.

A case is a folder: the model, the manager as a plug-in, and ``case.safetensors`` with the context, the slots kept and
the logits of a question asked afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from evomem.errors import EvomemError
from evomem.managers import MemoryManager, build
from evomem.models import load
from evomem.plugins import save
from evomem.testing.models import tiny

SPECS = (
    "full",
    "keydiff(budget=24)",
    "keydiff(budget=0.3)",
    "knorm(budget=24)",
    "streaming_llm(budget=24)",
    "tova(budget=24)",
    "h2o(budget=24)",
    "observed_attention(budget=24)",
    "snapkv(window=16, budget=40)",
    "expected_attention(budget=24)",
    "pyramidkv(window=8, beta=4, budget=24)",
    "adakv(snapkv(window=16), budget=40)",
    "feature_scorer(budget=24)",
    "feature_scorer(budget=24, allocation=2, layers=2, heads=2, hidden=3)",
    "namm(every=none, selection=threshold)",
    "namm(every=none, budget=24)",
    "kv_policy(budget=24)",
    "kv_policy(budget=24, allocation=2, layers=2, heads=2, scale=model)",
)
SMOLLM = ("keydiff(budget=64)", "snapkv(budget=64)", "feature_scorer(budget=64)", "namm(every=none, budget=64)")
QUESTION = 5


def randomised(spec: str) -> MemoryManager:
    """Return the manager with random parameters, so that it has something to say."""
    manager = build(spec)
    generator = torch.Generator().manual_seed(1)
    for parameter in manager.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return manager.requires_grad_(False)


@torch.no_grad()
def record(folder: Path, model: PreTrainedModel, manager: MemoryManager, ids: torch.Tensor) -> None:
    """Read ``ids`` (1, tokens), but for the last five; decide; ask these five."""
    context, question = ids[:, :-QUESTION], ids[:, -QUESTION:]
    with manager.attach(model) as cache:
        model(context, past_key_values=cache)
        kept = {f"kept.{at}": slots.clone() for at, slots in enumerate(layer.slots for layer in cache.layers)}
        logits = model(question, past_key_values=cache).logits
    save(manager, folder / "plugin", {})
    save_file({**kept, "ids": ids, "logits": logits.contiguous()}, folder / "case.safetensors")


def main(folder: Path) -> None:
    """Write every case into ``folder``."""
    for family in ("llama", "qwen3"):
        model = tiny(family, layers=3)
        model.save_pretrained(folder / family / "model")
        ids = torch.randint(5, 128, (1, 100), generator=torch.Generator().manual_seed(0))
        for at, spec in enumerate(SPECS):
            record(folder / family / str(at), model, randomised(spec), ids)
    try:
        loaded = load("smollm2-135m")
    except EvomemError as error:
        print(f"without SmolLM2: {error}")
        return
    loaded.model.save_pretrained(folder / "smollm2" / "model")
    text = Path(__file__).read_text()
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :400]
    for at, spec in enumerate(SMOLLM):
        record(folder / "smollm2" / str(at), loaded.model, randomised(spec), ids)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
