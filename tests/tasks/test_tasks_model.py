"""The tasks measure what they say on the real model: it answers with the context, and not without it."""

import pytest
import torch

from evomem.tasks import Split, build
from evomem.tasks.chance import check
from evomem.tasks.fitting import count_tokens


@pytest.mark.parametrize(("spec", "length", "least"), [("multikey_1", 300, -0.5), ("passkey", 200, -0.4)])
def test_the_full_cache_is_far_from_chance(smollm2, spec, length, least):
    tokenizer = smollm2.tokenizer
    task = build(spec, tokenizer, length)
    samples = task.samples(Split.SELECT, 2, seed=0)

    def loglik(context: str, sample) -> float:
        prompt = tokenizer.encode(context + sample.question, add_special_tokens=False)
        answer = tokenizer.encode(sample.answer, add_special_tokens=False)
        with torch.inference_mode():
            logits = smollm2.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())

    for sample in samples:
        assert length - 60 < count_tokens(tokenizer, sample.context + sample.question + sample.answer) <= length
    full = [loglik(sample.context, sample) for sample in samples]
    report = check(spec, [], task.uniform_chance, full, [loglik("", sample) for sample in samples])
    report.require()
    assert sum(full) / len(full) > least
    assert report.gain > 1.5
