"""The exact metric sees the text that the model's own ``generate`` writes: over a manager's cache, and stock."""

from __future__ import annotations

import pytest
import torch

from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.evaluation.measurement import EXACT
from evomem.managers import build
from evomem.memory.kv.versions import passed
from evomem.models import LoadedModel
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = [w for w in map(TOKENIZER.decode, range(6, 120)) if len(TOKENIZER.encode(w, add_special_tokens=False)) == 1]
LIMIT = 9


class Texts:
    """A metric that keeps what it is shown."""

    name, uniform_chance, has_exact = "texts", 0.0, True

    def __init__(self):
        self.seen = []

    def score(self, sample, output):
        self.seen.append(output)
        return 0.0


def sample(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    parts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in (40, 6, 3)]
    return Sample("words", *parts, ("w",), LIMIT)


def own_ids(evaluator, manager, drawn) -> list[int]:
    """What `model.generate` appends over the manager's cache; for ``full`` without anything of evomem's."""
    tokens, model = evaluator.tokens(drawn), evaluator.loaded.model
    ids = torch.cat((tokens.read, tokens.prompt), 1)
    settings = {"do_sample": False, "max_new_tokens": LIMIT, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        if manager.name == "full":
            return model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
        with evaluator.scheduled(manager).attach(model) as cache:
            with cache.reading():
                model(tokens.read, use_cache=True, **passed(cache, model))
            return model.generate(ids, **passed(cache), **settings)[0, ids.shape[1] :].tolist()


def ending_at(ids: list[int], where: int | None) -> int | list[int]:
    """Ids that end a text: the one at a place, after others that never come; none of the first for None."""
    absent = [token for token in range(100, 120) if token not in ids][:2]
    return absent if where is None else ids[0] if where == 0 else [*absent, ids[where]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", ["full", "keydiff(budget=12)", "h2o(budget=12)"])
@pytest.mark.parametrize("protocol", [EvaluationProtocol(), EvaluationProtocol(kind="streaming", every=16)], ids=str)
def test_the_text_is_what_generate_writes(family, spec, protocol):
    model, drawn = tiny(family, layers=2), sample()
    loaded, manager = LoadedModel(family, model, TOKENIZER, family), build(spec)
    free = own_ids(Evaluator(loaded, protocol), manager, drawn)
    assert len(free) == LIMIT
    assert len(set(free)) > 2
    for where in (None, 0, 4, LIMIT - 1):  # by the number of tokens; at once; in the middle; with the last one
        model.generation_config.eos_token_id = ending_at(free, where)
        evaluator, task = Evaluator(loaded, protocol), Texts()
        ids = own_ids(evaluator, manager, drawn)
        assert len(ids) == (LIMIT if where is None else 1 + free.index(free[where]))
        text = TOKENIZER.decode(ids if where is None else ids[:-1], skip_special_tokens=True)
        evaluator.evaluate([manager, manager], drawn, task, EXACT)
        evaluator.evaluate_plainly(manager, drawn, task, EXACT)
        assert task.seen == [text] * 3
        assert bool(text) is (where is None or len(ids) > 1)
