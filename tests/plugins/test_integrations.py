"""Where a plug-in plugs in: pipelines, chats, sampling, assistants, device maps, and the parts of other libraries."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

import evomem.models
from evomem.errors import CacheError, ConfigError
from evomem.evaluation.population import Recording
from evomem.managers import MemoryManager, build
from evomem.memory import attached
from evomem.memory.kv.cache import SlotCache
from evomem.memory.kv.recompute import recomputed
from evomem.memory.kv.rotary import find_rotaries
from evomem.models import LoadedModel
from evomem.testing.comparing import greedy, random_rows, read
from evomem.testing.models import tiny, tiny_tokenizer
from evomem.testing.reference import Batch, explicit_biases, explicit_pass

ALL = frozenset({"attention_sum", "attention_spectrum", "window_attention:5", "query_statistics"})


PROMPTS = ["the grass is green the sky is blue the sun is yellow here we go there and back again", "a cat and a dog"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", layers=3)


def encoded(prompts: list[str]) -> dict[str, torch.Tensor]:
    inputs = tiny_tokenizer()(prompts, return_tensors="pt", padding=True)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["full", "keydiff(budget=9)", "h2o(budget=6, every=5)"])
def test_pipeline_says_what_generate_says(model, spec: str) -> None:
    tokenizer, manager = tiny_tokenizer(), build(spec)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with manager.attach(model) as cache:
        batch = pipe(PROMPTS, batch_size=2, past_key_values=cache, **settings)
        alone = [pipe(prompt, past_key_values=manager.new_cache(model), **settings) for prompt in PROMPTS]
    for prompt, (one,), (other,) in zip(PROMPTS, batch, alone, strict=True):
        ids = encoded([prompt])["input_ids"]
        with manager.attach(model) as cache:  # token by token, without generate
            logits = model(ids, past_key_values=cache).logits
            said: list[int] = []
            for _ in range(6):
                said.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([[said[-1]]]), past_key_values=cache).logits
        wanted = tokenizer.decode(said, skip_special_tokens=True)
        assert one["generated_text"].strip() == other["generated_text"].strip() == wanted


def test_assistants(model) -> None:
    """Speculated tokens leave nothing behind where all is kept; what cannot be taken back is refused."""
    ids, assistant = encoded(PROMPTS[:1])["input_ids"], tiny("llama", layers=1)
    for more in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        outputs = []
        for settings in ({}, more):
            with build("full").attach(model) as cache:
                outputs.append(greedy(model, cache, ids, 10, **settings))
        assert torch.equal(*outputs)
        refusals, said = (
            (CacheError, ValueError),
            "cannot be cropped|requires a cache that can be cropped",
        )  # 5.24's own
        with pytest.raises(refusals, match=said), build("namm").attach(model) as cache:
            greedy(model, cache, ids, 10, **more)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_device_maps_change_nothing(family: str, where: str, tmp_path: Path) -> None:
    whole = tiny(family, layers=3)
    whole.save_pretrained(tmp_path / "model")
    inner, layers = ("model", "layers") if family == "llama" else ("transformer", "h")
    places: dict[str, str] = {"": "cpu"}
    if where == "disk":
        places = {f"{inner}.{name}": "cpu" for name, _ in getattr(whole, inner).named_children() if name != layers}
        places |= {"lm_head": "cpu", f"{inner}.{layers}.0": "cpu"}
        places |= {f"{inner}.{layers}.{at}": "disk" for at in (1, 2)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert any(p.is_meta for p in spread.parameters()) == (where == "disk")
    inputs = encoded(PROMPTS)
    for spec in ("keydiff(budget=9)", "h2o(budget=6, every=5)", "snapkv(budget=8, window=4)"):
        seen = []
        for one in (whole, spread):
            with torch.no_grad(), build(spec).attach(one) as cache:
                said = greedy(one, cache, inputs["input_ids"], 6, inputs["attention_mask"].bool())
                seen.append([said, *(layer.slots for layer in cache.layers)])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*seen, strict=True))


def plainly(
    loaded: LoadedModel, manager: MemoryManager, first: torch.Tensor, rest: torch.Tensor, new: int
) -> list[int]:
    """Greedy tokens after reading ``first``, deciding, and reading ``rest``; without generate."""
    with torch.no_grad(), manager.attach(loaded.model) as cache:
        loaded.model(first, past_key_values=cache)
        logits = loaded.model(rest, past_key_values=cache).logits
        said: list[int] = []
        while len(said) < new and loaded.tokenizer.eos_token_id not in said:
            said.append(int(logits[0, -1].argmax()))
            logits = loaded.model(torch.tensor([[said[-1]]]), past_key_values=cache).logits
    return said


def test_a_chat_on_one_cache(smollm2) -> None:
    """Two turns through the chat template of a real model; the second remembers, and reads only what is new."""
    model, tokenizer = smollm2.model, smollm2.tokenizer
    manager = build("keydiff(budget=48)")
    fill = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    chat = [{"role": "user", "content": fill * 2 + "Remember: the magic word is banana."}]
    settings: dict[str, Any] = {"return_tensors": "pt", "return_dict": True, "add_generation_prompt": True}
    with manager.attach(model) as cache:
        first = tokenizer.apply_chat_template(chat, **settings)
        tokens = model.generate(**first, past_key_values=cache, max_new_tokens=8, do_sample=False)
        begin = first["input_ids"].shape[1]
        answer = tokenizer.decode(tokens[0, begin:], skip_special_tokens=True)
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What is the magic word?"}]
        second = tokenizer.apply_chat_template(chat, **settings)
        known = cache.get_seq_length()
        assert torch.equal(second["input_ids"][:, :known], tokens[:, :known])
        assert {int(n) for n in cache.slots_held()[0].flatten()} == {48 + known - begin}
        tokens = model.generate(**second, past_key_values=cache, max_new_tokens=8, do_sample=False)
        said = tokens[0, second["input_ids"].shape[1] :].tolist()
    assert "banana" in tokenizer.decode(said)
    expected = plainly(smollm2, manager, first["input_ids"], second["input_ids"][:, begin:], 8)
    assert said == expected[: len(said)]
    assert (
        len(said) == 8 or said[-1] == model.generation_config.eos_token_id
    )  # which of the two depends on the processor's rounding


DOCS = Path(__file__).parents[2] / "docs/integrations.md"


def test_snippets_of_the_page_run(smollm2, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    load = evomem.models.load  # a model that is read already need not be read again
    monkeypatch.setattr(evomem.models, "load", lambda name, **more: load(name, **more) if more else smollm2)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    ready = [block for block in blocks if not block.startswith(("# in kvpress", "# needs a model"))]
    assert len(ready) == len(blocks) - 2 == 9
    names: dict[str, Any] = {}
    for block in ready:
        exec(compile(block, str(DOCS), "exec"), names)
    assert "banana" in names["answer"]["generated_text"][-12:]
    assert names["keep"].sum(-1).tolist() == [[64, 64]]
    assert (tmp_path / "context.safetensors").exists()


# ---- other engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_observations_of_another_engine_equal_what_our_cache_records(family: str, monkeypatch) -> None:
    monkeypatch.setattr("evomem.memory.kv.recompute.BLOCK_ELEMENTS", 1)  # many blocks
    model = tiny(family, layers=2)
    batch = Batch.of(random_rows(model, [70, 70], 3))
    with attached(model):
        cache = SlotCache.for_model(model, Recording(ALL))
        cache.decides_after_forward = False
        read(model, cache, batch)
        views = [layer.view() for layer in cache.layers]
    _, _, queries = explicit_pass(model, batch, explicit_biases({}, batch, 2, views[0].slots.shape[1], None))
    rotaries = find_rotaries(model, 2)
    for view, query, rotary in zip(views, queries, rotaries, strict=True):
        got = recomputed(ALL, query, view.keys, scale=query.shape[-1] ** -0.5, rotary=rotary)
        assert got.keys() == view.recorded.keys()
        for name, wanted in view.recorded.items():
            torch.testing.assert_close(got[name], wanted, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("library", "words"),
    [("kvpress", r"transformers < 5\.3.*pip install"), ("lm_eval", r"pip install 'lm_eval\[hf\]'")],
)
def test_missing_libraries_are_explained(library: str, words: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"evomem.plugins.{library}", raising=False)
    with pytest.raises(ConfigError, match=words):
        importlib.import_module(f"evomem.plugins.{library}")
