"""Models of folders and by name; the real model."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from evomem.errors import ModelError
from evomem.models import folder_digest, load
from evomem.testing.models import tiny, tiny_tokenizer
from tests.models.test_models import harm_truncate


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_local_folder_is_loaded_frozen_and_unchanged(folder):
    loaded = load(str(folder))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "left"
    with pytest.raises(FrozenInstanceError):
        loaded.name = "other"  # type: ignore[misc]
    ids = torch.tensor([loaded.tokenizer.encode("the special magic number is 12")])
    assert torch.equal(loaded.model(ids).logits, tiny("llama")(ids).logits)
    assert load(str(folder), dtype=torch.bfloat16, attn="eager").model.dtype == torch.bfloat16


def test_a_missing_padding_token_becomes_the_end_token(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = load(str(folder))
    batch = loaded.tokenizer(["the cat", "cat"], padding=True)
    assert batch["input_ids"][1][0] == loaded.tokenizer.eos_token_id
    assert batch["attention_mask"] == [[1, 1], [0, 1]]


def test_the_digest_is_of_the_weights_and_the_configuration_alone(folder, tmp_path):
    digest = load(str(folder)).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert load(str(folder), dtype=torch.float16).digest == digest
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert folder_digest(copy) == digest
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert folder_digest(copy) != digest
    tiny("llama", seed=1).save_pretrained(copy)
    assert folder_digest(copy) != digest
    tiny("llama", seed=0).save_pretrained(copy)
    assert folder_digest(copy) == digest


@pytest.mark.parametrize(
    ("lost", "said"),
    [("config.json", "config.json"), ("model.safetensors", "model.safetensors"), ("tokenizer.json", "tokenizer.json")],
)
def test_a_folder_says_what_it_lacks(folder, lost, said):
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=said):
        load(str(folder))


def test_a_missing_shard_is_named(folder):
    tiny("llama").save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(str(folder))
    shards[0].unlink()
    with pytest.raises(ModelError, match=re.escape(shards[0].name)):
        load(str(folder))


def test_damaged_weights_in_a_folder_are_a_model_error(folder):
    harm_truncate(folder)
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        load(str(folder))


def test_code_in_a_model_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    remote = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps({**config, **remote}))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        load(str(folder))


def test_names_that_lead_nowhere_fail_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"no-such-owner-evomem/nothing.*Aliases: .*smollm2-135m"):
        load("no-such-owner-evomem/nothing")
    assert time.monotonic() - start < 15
    with pytest.raises(ModelError, match="no such folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        load("smollm2_135m!")


# ---- the real model -----------------------------------------------------------------------------------------------


def test_smollm2_writes_english(smollm2):
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    text = smollm2.tokenizer.decode(smollm2.model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)


def test_smollm2_reads_padded_batches_like_single_texts(smollm2):
    texts = ["The grass is green. The sky is", "Water"]
    batch = smollm2.tokenizer(texts, padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = smollm2.model(**batch, position_ids=positions).logits[:, -1]
    for row, text in enumerate(texts):
        alone = smollm2.model(**smollm2.tokenizer(text, return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=2e-3, rtol=1e-3)


def test_smollm2_tokenizer_round_trips(smollm2):
    text = "One of the special magic numbers for  naïve-cat is: 7141592.\n\n\tdef f(x):  return 42"
    ids = smollm2.tokenizer.encode(text)
    assert smollm2.tokenizer.decode(ids) == text
    digits = [t for t in smollm2.tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in t)]
    assert digits == list("714159242")
