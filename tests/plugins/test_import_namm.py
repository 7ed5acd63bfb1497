from __future__ import annotations

import collections
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from evomem import plugins
from evomem.cli.app import app
from evomem.cli.commands.import_namm import read_namm
from evomem.errors import ConfigError
from evomem.managers import NAMM
from evomem.testing import namm as replaying

RECORDING = Path(__file__).parents[1] / "data" / "namm_bam_update.npz"


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDING) as loaded:
        return {name: torch.from_numpy(loaded[name]).float() for name in ("theta", "mean", "var")}


def checkpoint(recorded, merged=100.0):
    """What the paper's code writes, the search's own state included."""
    theta, zeros = recorded["theta"], torch.zeros(1, 1, 1, 17)
    stored = "token_embedding_0_"
    state = collections.OrderedDict(
        {
            "g": torch.tensor(3.0), "sigma": torch.tensor(0.065), "C": torch.eye(5), "mean": theta,
            "best_member": theta * 2,
            f"stored_buffers_to_save.{stored}online_new_output_mean": zeros + 7,
            f"stored_buffers_to_save.{stored}online_new_output_var": zeros + 8,
            f"stored_buffers_to_save.{stored}output_mean": recorded["mean"].reshape(1, 1, 1, 17),
            f"stored_buffers_to_save.{stored}output_var": recorded["var"].reshape(1, 1, 1, 17),
            f"stored_buffers_to_save.{stored}output_num": torch.tensor(merged),
            f"best_stored_buffers_to_save.{stored}output_mean": recorded["mean"].reshape(1, 1, 1, 17) + 1,
            f"best_stored_buffers_to_save.{stored}output_var": recorded["var"].reshape(1, 1, 1, 17) + 1,
            f"best_stored_buffers_to_save.{stored}output_num": torch.tensor(100.0),
        }
    )  # fmt: skip
    return {"evolution_state": state, "iter_num": 670, "best_val_loss": np.float64(29.33)}


def written(tmp_path, kind, recorded):
    path = tmp_path / f"file{kind}"
    if kind == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in recorded.items()})
    elif kind == ".safetensors":
        safetensors.torch.save_file(recorded, path)
    else:
        torch.save(checkpoint(recorded), path)
    return path


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".pt"])
def test_every_layout_gives_the_recorded_manager(kind, recorded, tmp_path):
    path = written(tmp_path, kind, recorded)
    out = tmp_path / "plug"
    result = CliRunner().invoke(app, ["import-namm", str(path), "--out", str(out), "--every", "256", "--budget", "77"])
    assert result.exit_code == 0, result.output
    manager = plugins.load(out)
    assert isinstance(manager, NAMM)
    assert np.array_equal(manager.to_vector(), recorded["theta"].double().numpy())
    assert torch.equal(manager.spectrum_mean, recorded["mean"])
    assert torch.equal(manager.spectrum_var, recorded["var"])
    assert (manager.options.every, manager.options.budget) == (256, 77)
    assert path.name in (out / "README.md").read_text()
    assert manager.provenance["imported"]["imported from"] == path.name


def test_the_imported_plug_in_reproduces_the_reference(tmp_path):
    """Features, scores and kept sets of four consecutive updates, as the reference implementation recorded them."""
    CliRunner().invoke(app, ["import-namm", str(RECORDING), "--out", str(tmp_path / "plug")], catch_exceptions=False)
    manager = plugins.load(tmp_path / "plug")
    recording = replaying.read(RECORDING)
    imported = replaying.Recording(manager.to_vector(), manager.spectrum_mean, manager.spectrum_var, recording.updates)
    differences = replaying.replay(imported)
    assert differences == replaying.replay(recording)
    assert differences.kept_mismatches == 0
    assert differences.scores < 1e-5
    # The scores of the plug-in itself on the recorded features, through its own scorer.
    with torch.no_grad():
        for update in recording.updates:
            assert torch.allclose(manager.scorer(update.features[None])[0], update.scores, atol=1e-5)


def test_the_best_member_comes_with_its_own_normalisation(recorded, tmp_path):
    torch.save(checkpoint(recorded), tmp_path / "c.pt")
    manager, provenance = read_namm(tmp_path / "c.pt", vector="best")
    assert np.array_equal(manager.to_vector(), (recorded["theta"] * 2).double().numpy())
    assert torch.equal(manager.spectrum_mean, recorded["mean"] + 1)
    assert provenance["imported"]["vector"] == "best_member"


def test_a_normalisation_that_is_not_merged_yet_is_the_new_one(recorded, tmp_path):
    torch.save(checkpoint(recorded, merged=0.0), tmp_path / "c.pt")
    manager, _ = read_namm(tmp_path / "c.pt")
    assert torch.equal(manager.spectrum_mean, torch.full((17,), 7.0))
    assert torch.equal(manager.spectrum_var, torch.full((17,), 8.0))


WRONG = {
    "expected 4,172 numbers, got 4,171": {"theta": torch.zeros(4171)},
    r"theta: expected 4,172 numbers, got 8,344 in the shape \(2, 4172\)": {"theta": torch.zeros(2, 4172)},
    "theta: 1 of 4,172 values are NaN": {"theta": torch.full((1,), torch.nan)},
    "theta: has type torch.int64": {"theta": torch.zeros(4172, dtype=torch.int64)},
    "mean: expected 17 numbers, got 16": {"mean": torch.zeros(16)},
    "var: is missing": {"var": ...},
    "var: -1.0 is negative": {"var": -torch.ones(17)},
    "unknown keys 'lambda'": {"lambda": torch.zeros(2)},
}


@pytest.mark.parametrize("message", WRONG)
def test_recordings_that_do_not_fit_are_told(message, recorded, tmp_path):
    data = dict(recorded)
    for name, value in WRONG[message].items():
        if value is ...:
            del data[name]
        elif "NaN" in message:
            data[name] = data[name].clone()
            data[name][3] = value
        else:
            data[name] = value
    safetensors.torch.save_file(data, tmp_path / "r.safetensors")
    with pytest.raises(ConfigError, match=message):
        read_namm(tmp_path / "r.safetensors")
    result = CliRunner().invoke(app, ["import-namm", str(tmp_path / "r.safetensors"), "--out", str(tmp_path / "plug")])
    assert result.exit_code == 2
    assert not (tmp_path / "plug").exists()


@pytest.mark.parametrize(
    ("message", "left_out"),
    [
        ("unknown keys .* expected theta, mean and var, or evolution_state", "mean"),
        ("no normalisation of 17 bins", "stored_buffers_to_save.token_embedding_0_output_mean"),
        ("output_var: is missing", "stored_buffers_to_save.token_embedding_0_output_var"),
    ],
)
def test_checkpoints_that_do_not_fit_are_told(message, left_out, recorded, tmp_path):
    data = checkpoint(recorded)
    del data["evolution_state"][left_out]
    torch.save(data, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=message):
        read_namm(tmp_path / "c.pt")


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".pt"])
def test_damage_and_code_are_refused(kind, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    path = written(tmp_path, kind, recorded)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04" + bytes(100), bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="file"):
            read_namm(path)
    torch.save({"evolution_state": {"mean": Payload()}}, path.with_suffix(".pt"))
    with pytest.raises(ConfigError, match="not only numbers"):
        read_namm(path.with_suffix(".pt"))
    np.savez(path.with_suffix(".npz"), theta=np.array([Payload()], dtype=object))
    with pytest.raises(ConfigError, match="not only numbers"):
        read_namm(path.with_suffix(".npz"))
    assert not (tmp_path / "canary").exists()


def test_other_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_namm(tmp_path / "nothing.npz")
    (tmp_path / "vector.csv").write_text("1,2")
    with pytest.raises(ConfigError, match=r"\.csv; expected one of"):
        read_namm(tmp_path / "vector.csv")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds list"):
        read_namm(tmp_path / "list.pt")
