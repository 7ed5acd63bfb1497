"""A search on a tiny model whose workers share weights and contexts, and log what they read and evaluate."""

from __future__ import annotations

from functools import partial

from faulty_search import note
from synthetic_search import experiment
from test_block_search import SETTINGS, SPACE, STAGES, Words

from evomem.evaluation import Evaluator
from evomem.evaluation.store import token_key
from evomem.models import LoadedModel
from evomem.models.sharing import assemble, dismantle
from evomem.runs import Bench
from evomem.runs.bench import Elsewhere
from evomem.testing.models import tiny, tiny_tokenizer


def configured(*settings):
    """Two stages: every head by its attention (block_cmaes), then all by the likelihood."""
    stages = [{**stage, "generations": 2} for stage in STAGES]
    return experiment(*SETTINGS, *settings, space=SPACE, stages=stages)


class Logged(Evaluator):
    log = None

    def evaluate(self, managers, sample, task, **options):
        note(self.log, f"evaluate/{sample.id}")
        return super().evaluate(managers, sample, task, **options)

    def _read(self, tokens, observes):
        note(self.log, f"read/{token_key(tokens)}")
        return super()._read(tokens, observes)


def bench(log):
    """Return the factory."""

    def make(config):
        loaded = LoadedModel("tiny", tiny("llama", layers=2), tiny_tokenizer(), "tiny")
        return made(config, loaded, None, log, Elsewhere(partial(dismantle, loaded), partial(elsewhere, log)))

    return make


def elsewhere(log, config, parts, readings):
    return made(config, assemble(parts, "cpu"), readings, log)


def made(config, loaded, readings, log, shared=None):
    evaluator = Logged(loaded, config.protocol, store=readings)
    evaluator.log = log
    return Bench(evaluator, lambda task: Words(), provenance={"model_digest": "tiny"}, elsewhere=shared)
