"""What `load` must refuse: everything that is not exactly the model of its folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomem.errors import ModelError
from evomem.models import load
from evomem.models.exact import check_numbers, nothing_random
from evomem.models.loading import exactly
from evomem.testing.models import FAMILIES, tiny, tiny_tokenizer

METADATA = {"format": "pt"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("saved"), "llama")


def saved(root: Path, family: str, **changes) -> Path:
    folder = root / family
    tiny(family, layers=2, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    shutil.copytree(llama, tmp_path / "llama")
    return tmp_path / "llama"


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change({name: value.clone() for name, value in tensors.items()}), folder / "model.safetensors", METADATA)


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)  # a list of as many as there were
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def without(part: str):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def added(name: str, shape: tuple[int, ...]):
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(".layers.1."), r"missing in the files.*9 tensors.*layers\.1\."),
        (without("lm_head"), r"missing.*lm_head"),
        (without("layers.0.mlp.up_proj"), r"missing.*model\.layers\.0\.mlp\.up_proj"),
        (renamed("model.", "encoder."), r"(?s)missing.*no place.*encoder"),
        (renamed("layers.1.", "layers.7."), r"(?s)missing.*no place for it.*layers\.7\."),
        (added("model.layers.0.mlp.gate_proj.bias", (96,)), r"no place for it: 1 tensors: .*gate_proj\.bias"),
        (added("layers.0.mlp.up_proj.weight", (96, 64)), r"in the files twice.*layers\.0\.mlp\.up_proj"),
        (
            lambda tensors: {**tensors, "lm_head.weight": torch.zeros(128, 32)},
            r"\(128, 32\) in the files and \(128, 64",
        ),
        (lambda tensors: {"nothing": torch.zeros(1)}, r"(?s)missing.*no place"),
    ],
)
def test_weights_that_are_missing_foreign_twice_or_of_another_shape(folder, change, said):
    change_weights(folder, change)
    with pytest.raises(ModelError, match=said) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("layers", [1, 3, 9])
def test_a_number_of_layers_that_is_not_the_files(folder, layers):
    change_config(folder, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=f"configuration says {layers} layers, the files hold layers up to number 1"):
        load(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("harm", ["lower", "raise"])
def test_every_family_notices_its_layers(tmp_path, family, harm):
    folder = saved(tmp_path, family)
    load(str(folder))
    change_config(folder, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1 if harm == "lower" else 3})
    with pytest.raises(ModelError, match="not exactly"):
        load(str(folder))


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**12}, {"vocab_size": 10**9}, {"hidden_size": 10**8},
     {"intermediate_size": 10**30}, {"num_attention_heads": 10**7}, {"layer_types_": ["full_attention"] * 10**5},
     {"max_position_embeddings": 10**300}],
)  # fmt: skip
def test_a_configuration_that_asks_for_the_impossible_is_refused_at_once(folder, fields):
    change_config(folder, **fields)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=next(iter(fields))):
        load(str(folder))
    assert time.monotonic() - begin < 5


def test_a_decision_transformer_is_no_exception(tmp_path):
    from evomem.files.resources import resource_folder

    folder = tmp_path / "tmaze"
    shutil.copytree(resource_folder("experiments") / "zoo" / "models" / "zoo-tmaze", folder)
    load(str(folder))
    change_weights(folder, without("decision.encoder.h.0.ln_1"))
    with pytest.raises(ModelError, match="missing"):
        load(str(folder))


def test_tied_weights_and_buffers_that_old_versions_saved_are_legal(tmp_path):
    folder = saved(tmp_path, "gpt2", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    before = load(str(folder))
    old = {
        "transformer.h.0.attn.bias": torch.tril(torch.ones(1, 1, 8, 8)),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    change_weights(folder, lambda tensors: {**tensors, **old})
    after = load(str(folder))
    ids = torch.arange(5)[None]
    assert torch.equal(before.model(ids).logits, after.model(ids).logits)


def test_embeddings_that_are_tied_and_two_are_said(tmp_path, caplog):
    folder = saved(tmp_path, "llama", tie_word_embeddings=True)
    load(str(folder))
    assert not caplog.text
    change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    load(str(folder))
    assert "both are present in the checkpoints with different values" in caplog.text


def test_the_random_state_is_as_it_was_and_draws_are_noticed(folder):
    before = torch.random.get_rng_state()
    load(str(folder))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ModelError, match="at random"), nothing_random("here"):
        torch.rand(1)


def test_a_loader_of_another_project_is_watched(folder, caplog):
    from transformers import AutoModelForCausalLM

    with exactly("here"):
        AutoModelForCausalLM.from_pretrained(folder)
    change_weights(folder, without(".layers.1."))
    with pytest.raises(ModelError, match=r"(?s)here: its files are not exactly.*layers\.1"), exactly("here"):
        AutoModelForCausalLM.from_pretrained(folder)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folder) -> Path:
    tiny("llama", layers=2).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    load(str(folder))
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_two_sets_of_weights(sharded, llama):
    shutil.copy(llama / "model.safetensors", sharded)
    with pytest.raises(ModelError, match="two sets of weights"):
        load(str(sharded))


def test_a_name_in_two_shards(sharded):
    first, second, *_ = shards_of(sharded)
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value + 1}, second, METADATA)
    with pytest.raises(ModelError, match=f"{name} is in two files"):
        load(str(sharded))


def test_an_index_that_says_what_is_not_so(sharded):
    change_index(sharded, lambda index: index["weight_map"].update({"model.other": shards_of(sharded)[0].name}))
    with pytest.raises(ModelError, match=r"model\.other.*is in none of its files"):
        load(str(sharded))


@pytest.mark.parametrize("claimed", ["../other.safetensors", "model-9.safetensors", 7, ["a"], None])
def test_an_index_that_names_what_is_no_shard(sharded, claimed):
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": claimed}))
    with pytest.raises(ModelError, match=r"index\.json"):
        load(str(sharded))


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_shard(sharded, size):
    with shards_of(sharded)[-1].open("r+b") as file:
        file.truncate(size if size >= 0 else shards_of(sharded)[-1].stat().st_size + size)
    with pytest.raises(ModelError, match="safetensors"):
        load(str(sharded))


def test_a_name_twice_in_one_header(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["model.norm.weight"])
    header = header[:-1] + f',"model.norm.weight":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(ModelError, match="twice"):
        load(str(folder))


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(folder, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        return tensors

    change_weights(folder, spoil)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of 6,144 numbers"):
        load(str(folder))


@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_of_a_type_that_weights_do_not_have(folder, kind):
    name = "model.layers.1.self_attn.k_proj.weight"
    change_weights(folder, lambda tensors: {**tensors, name: tensors[name].to(kind)})
    with pytest.raises(ModelError, match=rf"{name} is stored as (BOOL|I8|I64|F8_E4M3), and config.json says nothing"):
        load(str(folder))


def test_a_file_that_changed_and_has_its_old_time_has_another_digest(folder):
    path = folder / "model.safetensors"
    before, times = load(str(folder)).digest, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert load(str(folder)).digest != before


def test_weights_that_are_too_large_for_the_type(folder):
    def grow(tensors):
        tensors["model.norm.weight"][0] = 1e5
        return tensors

    change_weights(folder, grow)
    load(str(folder), dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"model\.norm\.weight: 1 of 64 .*float16.*float32"):
        load(str(folder), dtype=torch.float16)


def test_a_sum_that_overflows_is_not_taken_for_a_weight_that_is_no_number():
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(layer.weight, 3e38)
    check_numbers("here", layer)


def test_weights_that_are_not_in_memory_are_checked_in_their_files(folder):
    model = tiny("llama", layers=2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        check_numbers("here", model.to("meta"), [folder / "model.safetensors"])
