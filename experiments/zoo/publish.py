"""Model: from a finished training to a folder that is shipped: weights, tokenizer, recipe and what it can do."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import evomem.models
from evomem.evaluation import Evaluator
from evomem.managers import build as build_manager
from evomem.models.files import sha256, write_json
from evomem.tasks import Split
from evomem.tasks import build as build_task
from experiments.zoo.data import TASKS

if TYPE_CHECKING:
    from experiments.zoo.train import Training

MODELS = Path(__file__).resolve().parent / "models"
LENGTHS = (128, 256, 512, 1024)
SAMPLES = 50
RECORD = "recipe.json"


def accuracy(loaded: evomem.models.LoadedModel, task: str, length: int, samples: int) -> tuple[float, float]:
    """Return the share of right words and the mean log-likelihood (nats a token) on sealed samples, full cache."""
    built = build_task(task, loaded.tokenizer, length)
    evaluator, full = Evaluator(loaded), [build_manager("full")]
    found = [
        evaluator.evaluate(full, sample, built, exact=True)[0] for sample in built.samples(Split.SEALED, samples, 0)
    ]
    exact = sum(one.exact or 0.0 for one in found) / len(found)
    return exact, sum(one.loglik for one in found) / len(found)


def measured(folder: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Return what the model in a folder can do: by task and length, ``[share of right words, log-likelihood]``."""
    loaded = evomem.models.load(str(folder))
    found: dict[str, Any] = {}
    for task in TASKS:
        found[task] = {str(n): [round(value, 4) for value in accuracy(loaded, task, n, samples)] for n in LENGTHS}
        print(f"{folder.name} {task} {found[task]}", flush=True)
    return found


def publish(training: Training, name: str, models: Path = MODELS) -> Path:
    """Write a model's folder, complete or not at all, and return it."""
    folder, fresh = models / name, models / f".{name}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    training.model.eval().save_pretrained(fresh)
    training.lessons.tokenizer.save_pretrained(fresh)
    recipe = {**asdict(training.recipe), "family": training.recipe.family.__name__}
    record = {
        "recipe": recipe,
        "seed": training.seed,
        **asdict(training.progress),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": sha256(fresh / "model.safetensors"),
        "sealed": {"samples": SAMPLES, "share_right_and_loglik": measured(fresh)},
    }
    write_json(fresh / RECORD, record)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors and temporary files are private to their writer
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    return folder
