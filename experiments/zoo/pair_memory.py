"""Writes the folders of memories that read streams: ``python -m experiments.zoo.pair_memory``. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from evomem.models.architectures.pair_memory import PairMemoryConfig, PairMemoryModel, pair_memory_tokenizer

MODELS = Path(__file__).resolve().parent / "models"
VARIANTS = {"pair-memory": None, "pair-memory-soft": 16.0}
"""β of each; None: reads are exact, by name."""


def publish(folder: Path, beta: float | None, sets: int = 1) -> None:
    """Write one folder; ``sets`` as in `PairMemoryConfig`."""
    torch.manual_seed(0)
    model = PairMemoryModel(PairMemoryConfig(beta=beta, num_attention_heads=sets))
    model.save_pretrained(folder)
    pair_memory_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    for name, beta in VARIANTS.items():
        publish(MODELS / name, beta)
