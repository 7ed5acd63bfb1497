"""A search on a tiny model whose workers share weights and contexts, and log what they read and evaluate."""

from __future__ import annotations

import time
from functools import partial

from evomem.evaluation import Evaluator
from evomem.evaluation.store import token_key
from evomem.models import LoadedModel
from evomem.models.sharing import assemble, dismantle
from evomem.runs import Bench
from evomem.runs.bench import WorkerBench
from evomem.testing.models import tiny, tiny_tokenizer
from tests.runs.test_block_search import SETTINGS, SPACE, STAGES, Words
from tests.support.faulty_search import entries, note
from tests.support.synthetic_search import experiment


def configured(*settings):
    """Two stages: every head by its attention (block_cmaes), then all by the likelihood."""
    stages = [{**stage, "generations": 2} for stage in STAGES]
    return experiment(*SETTINGS, *settings, space=SPACE, stages=stages)


class Logged(Evaluator):
    log, company = None, 1

    def evaluate(self, managers, sample, task, *options):
        """Evaluate, once as many processes as ``company`` have something to do: a fast one would leave others none."""
        note(self.log, f"evaluate/{sample.id}")
        patience = time.monotonic() + 60
        while len({pid for _, pid, _ in entries(self.log)}) < self.company and time.monotonic() < patience:
            time.sleep(0.05)
        self.company = 1
        return super().evaluate(managers, sample, task, *options)

    def _read(self, tokens, observes):
        note(self.log, f"read/{token_key(tokens)}")
        return super()._read(tokens, observes)


def bench(log, company=1):
    """Return the factory; ``company`` is how many workers must be at work before the first of them goes on."""

    def make(config):
        loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")
        shared = WorkerBench(partial(dismantle, loaded), partial(in_worker, log, company))
        return made(config, loaded, None, log, shared)

    return make


def in_worker(log, company, config, parts, readings):
    return made(config, assemble(parts, "cpu"), readings, log, company=company)


def made(config, loaded, readings, log, shared=None, company=1):
    evaluator = Logged(loaded, config.protocol, store=readings)
    evaluator.log, evaluator.company = log, company
    return Bench(evaluator, lambda task: Words(), provenance={"model_digest": "tiny"}, in_workers=shared)
