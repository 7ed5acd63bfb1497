"""Model: from a finished training to a folder that is shipped: weights, tokenizer, recipe and what it can do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import evomem.models
from evomem.evaluation import Evaluation, Evaluator
from evomem.evaluation.measurement import EXACT, EvaluationProtocol
from evomem.managers import build as build_manager
from evomem.memory.kv.attach import has_own_memory
from evomem.models.architectures.fam import Fam
from evomem.models.architectures.memory_matrix import MemoryMatrix
from evomem.models.pretrained.files import sha256, write_json
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.data import RESTATED
from experiments.zoo.matrix_recall import own_recall

if TYPE_CHECKING:
    from experiments.zoo.train import Training

MODELS = Path(__file__).resolve().parent / "models"
LENGTHS = (128, 256, 512, 1024)
FAM_BLOCKS = (2, 3, 4, 8, 16, 32)
"""Blocks of text that a feedback memory is asked after."""
SAMPLES = 50
"""Sealed samples of each kind of question; of a matrix or a mosaic `OWN_SAMPLES`."""
OWN_SAMPLES = 16
RECORD = "recipe.json"


def accuracy(loaded: evomem.models.LoadedModel, task: str, length: int, samples: int) -> dict[str, tuple[float, float]]:
    """Return the share of right words and the mean log-likelihood (nats a token) on sealed samples, full cache.

    By kind of question: the task's name, and with ``zoo_forgetting`` those about restated keys apart; ``samples`` each.
    """
    built = build_task(task, loaded.tokenizer, length)
    # A memory of the model's own is decided about while it reads; as `full` keeps everything, when does not matter.
    protocol = EvaluationProtocol(kind="streaming", every=length) if has_own_memory(loaded.model) else None
    evaluator, full = Evaluator(loaded, protocol), [build_manager("full")]
    found: dict[str, list[Evaluation]] = {}
    for sample in built.samples(Split.SEALED, samples * (1 + (task == "zoo_forgetting")), 0):
        kind = RESTATED if sample.meta.get("restated") else task
        found.setdefault(kind, []).extend(evaluator.evaluate(full, sample, built, EXACT))
    return {
        kind: (sum(one.required("exact") for one in of) / len(of), sum(one.loglik for one in of) / len(of))
        for kind, of in found.items()
    }


def measured(folder: Path, tasks: Sequence[str], samples: int = SAMPLES) -> dict[str, Any]:
    """Return what the model in a folder can do: by kind and length, ``[share of right words, log-likelihood]``."""
    loaded = evomem.models.load(str(folder))
    if isinstance(loaded.model, MemoryMatrix):
        return own_measured(loaded, tasks, LENGTHS[:2], samples, empties=True)
    if isinstance(loaded.model, Fam):
        block = loaded.model.config.block
        return own_measured(loaded, tasks, [blocks * block for blocks in FAM_BLOCKS], samples)
    found: dict[str, Any] = {}
    for task in tasks:
        for length in LENGTHS:
            for kind, values in accuracy(loaded, task, length, samples).items():
                found.setdefault(kind, {})[str(length)] = [round(value, 4) for value in values]
                print(f"{folder.name} {kind} {length} {found[kind][str(length)]}", flush=True)
    return found


def own_measured(
    loaded: evomem.models.LoadedModel,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    *,
    empties: bool = False,
) -> dict[str, Any]:
    """Return what `measured` does of a model with a memory of its own, written by itself.

    empties : also under ``TASK emptied``, what is left of it when the memory is emptied between context and question.
    """
    evaluator, values = Evaluator(loaded), dict[str, Any]()
    for task in tasks:
        for length in lengths:
            drawn = build_task(task, loaded.tokenizer, length).samples(Split.SEALED, samples, 0)
            for kind, emptied in ((task, False), (f"{task} emptied", True))[: 1 + empties]:
                results = own_recall(evaluator, loaded.model, drawn, empties=emptied)
                means = [round(sum(column) / len(results), 4) for column in zip(*results, strict=True)]
                values.setdefault(kind, {})[str(length)] = means
                print(f"{loaded.name} {kind} {length} {means}", flush=True)
    return values


def publish(training: Training, name: str, models: Path = MODELS) -> Path:
    """Write a model's folder, complete or not at all, and return it."""
    folder, fresh = models / name, models / f".{name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    training.model.eval().save_pretrained(fresh)
    if isinstance(training.model, Fam):  # it has no positions to run out of
        training.lessons.tokenizer.model_max_length = VERY_LARGE_INTEGER
    training.lessons.tokenizer.save_pretrained(fresh)
    # A feedback memory is asked after short texts, and without a manager.
    few = has_own_memory(training.model) and not isinstance(training.model, Fam)
    samples = OWN_SAMPLES if few else SAMPLES
    recipe = {**asdict(training.recipe), "family": training.recipe.family.__name__}
    record = {
        "recipe": recipe,
        "seed": training.seed,
        **asdict(training.progress),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": sha256(fresh / "model.safetensors"),
        "sealed": {"samples": samples, "share_right_and_loglik": measured(fresh, training.recipe.tasks, samples)},
    }
    write_json(fresh / RECORD, record)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors and temporary files are private to their writer
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    return folder
