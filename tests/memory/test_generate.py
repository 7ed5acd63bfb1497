"""`generate` over the slot cache in all its ways: sampling, beams, padding, chunks, turns; silent, and in bf16."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache

from evomem.managers import Full, MemoryManager, build
from evomem.memory import Decision, LayerView, SlotCache, attached
from evomem.memory.kv.versions import passed
from evomem.testing.comparing import greedy, kept_tokens, random_rows, read, same_kept_tokens, same_logits
from evomem.testing.models import FAMILIES, tiny
from evomem.testing.reference import Batch


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Nothing that transformers or Python says reaches the user."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Listening(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    logger.removeHandler(handler)
    assert not said + [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=2)


@pytest.fixture(scope="module")
def batch(model) -> Batch:
    return Batch.of(random_rows(model, [30, 22], 0))


WAYS = {
    "greedy": {},
    "one token": {"max_new_tokens": 1, "min_new_tokens": 1},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_evicted_equals_stock(model, batch: Batch, way: str) -> None:
    some = batch if way != "prompt lookup" else batch.row(0)
    outputs = []
    for managed in (False, True):
        torch.manual_seed(3)
        with attached(model):
            cache = SlotCache.for_model(model, Full()) if managed else None
            if not managed:
                cache = DynamicCache(config=model.config)
            outputs.append(greedy(model, cache, some.ids, 8, some.real, **WAYS[way]))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("way", ["greedy", "sampling", "chunks", "several samples"])
def test_evicting_equals_itself_token_by_token(model, batch: Batch, way: str) -> None:
    """What was generated is what its own logits say, read straight through with the same manager."""
    manager = build("h2o(budget=9, every=8)")
    more = {**WAYS[way], "output_logits": True, "return_dict_in_generate": True}
    copies = WAYS[way].get("num_return_sequences", 1)
    with manager.attach(model) as cache:
        torch.manual_seed(1)
        out = model.generate(
            batch.ids, attention_mask=batch.real.long(), **passed(cache), max_new_tokens=6, pad_token_id=0, **more
        )
        real = torch.cat((batch.real.repeat_interleave(copies, 0), torch.ones(2 * copies, 6, dtype=torch.bool)), 1)
        whole = Batch(out.sequences, real, (real.long().cumsum(1) - 1).clamp(min=0))
        again = manager.new_cache(model)
        wanted = read(model, again, whole)[:, 29:-1]
    same_logits(way, torch.stack(out.logits, 1), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_that_grows(family: str) -> None:
    """Turn after turn the whole conversation is handed over; only what is new is read, as in one long pass."""
    model = tiny(family, layers=2)
    manager = build("streaming_llm(budget=12, every=10)")
    turns = random_rows(model, [17, 9, 14], 2)
    said = torch.empty(1, 0, dtype=torch.long)
    with manager.attach(model) as cache:
        read_so_far = 0
        for turn in turns:
            prompt = torch.cat((said, turn[None]), 1)
            answer = greedy(model, cache, prompt, 4)
            said = torch.cat((prompt, answer), 1)
            read_so_far = said.shape[1] - 1  # the last token is not read yet
            assert cache.get_seq_length() == read_so_far
            whole = manager.new_cache(model)
            logits = read(model, whole, Batch.of([said[0]]))
            assert torch.equal(logits[0, -5:-1].argmax(-1), answer[0])
            again = manager.new_cache(model)
            read(model, again, Batch.of([said[0, :-1]]))
            same_kept_tokens("conversation", kept_tokens(cache, 0), kept_tokens(again, 0))


def test_new_tokens_only_go_on_without_a_mask(model) -> None:
    """Plain forward calls without mask or positions know where they are, though slots were evicted."""
    manager = build("knorm(budget=6)")
    (row,) = random_rows(model, [25], 3)
    with manager.attach(model) as cache:
        got = [model(part[None], **passed(cache, model)).logits for part in (row[:15], row[15:16], row[16:])]
        again = manager.new_cache(model)
        wanted = read(model, again, Batch.of([row]), [15, 10])
    same_logits("forward without mask", torch.cat(got, 1), wanted)
    assert cache.get_seq_length() == 25
    assert [int(n) for layer in cache.slots_held() for n in layer.flatten()] == [6] * 4


def test_reading_in_passes_then_generate(model, batch: Batch) -> None:
    manager = build("knorm(budget=6)")
    with manager.attach(model) as cache:
        wanted = greedy(model, cache, batch.ids, 5, batch.real)
        parts = manager.new_cache(model)
        with parts.reading():
            read(model, parts, Batch(batch.ids[:, :29], batch.real[:, :29], batch.positions[:, :29]), [10, 19])
            logits = read(model, parts, batch, at=29)
        first = logits[:, -1:].argmax(-1)
        grown = torch.cat((batch.ids, first), 1)
        real = torch.cat((batch.real, torch.ones(2, 1, dtype=torch.bool)), 1)
        got = torch.cat((first, greedy(model, parts, grown, 4, real)), 1)
    assert torch.equal(got, wanted)


# ---- bf16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_nothing_evicted_is_as_close_to_fp32_as_stock(family: str) -> None:
    exact = tiny(family, layers=2)
    model = tiny(family, layers=2).bfloat16()
    batch = Batch.of(random_rows(model, [40, 29], 1))
    truth, stock = read(exact, None, batch)[batch.real], read(model, None, batch)[batch.real].float()
    error = (stock - truth).square().mean().sqrt()
    for spec in ("full", "h2o(budget=500, every=16)"):  # the second observes attention, beside the output
        with build(spec).attach(model) as cache:
            got = read(model, cache, batch, [25, 14, 1])[batch.real].float()
            assert cache.layers[0].keys.dtype == torch.bfloat16
        assert (got - truth).square().mean().sqrt() <= 1.5 * error


class Rounded(MemoryManager):
    """Scores that tie: key norms rounded to bf16 and further."""

    def score(self, view: LayerView) -> torch.Tensor:
        return -(view.keys.float().norm(dim=-1) / 4).round().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_older_token(dtype: torch.dtype) -> None:
    model = tiny("llama", layers=2).to(dtype)
    batch = Batch.of(random_rows(model, [40, 29], 1))
    seen: list[tuple[LayerView, Decision]] = []

    class Watching(Rounded):
        def decide(self, view: LayerView) -> Decision:
            seen.append((view, super().decide(view)))
            return seen[-1][1]

    with Watching(budget=9).attach(model) as cache:
        read(model, cache, batch)
    ties = 0
    for view, decision in seen:
        score = Rounded(budget=9).score(view)
        for row, head in ((r, h) for r in range(2) for h in range(2)):
            valid = view.valid[row, head]
            order = sorted(
                zip(score[row, head][valid].tolist(), view.slots[row, head][valid].tolist(), strict=True),
                key=lambda pair: (-pair[0], pair[1]),
            )
            wanted = sorted(token for _, token in order[:9])
            assert view.slots[row, head][decision.keep[row, head]].tolist() == wanted
            ties += order[8][0] == order[9][0]
    assert ties


def test_bf16_knorm_decides_as_its_keys_say(model) -> None:
    """Norms are taken in fp32, where bf16 would tie most of them."""
    low = tiny("llama", layers=2).bfloat16()
    batch = Batch.of(random_rows(low, [40], 1))
    views: list[LayerView] = []

    class Watching(type(build("knorm"))):
        def score(self, view: LayerView) -> torch.Tensor:
            views.append(view)
            return super().score(view)

    with Watching(budget=9).attach(low) as cache:
        read(low, cache, batch)
    for view, layer in zip(views, cache.layers, strict=True):
        norms = view.keys.double().norm(dim=-1)
        wanted = norms.sort(dim=-1, stable=True).indices[..., :9].sort(dim=-1).values
        assert torch.equal(layer.slots, wanted)
