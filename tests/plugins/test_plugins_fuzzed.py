"""Plug-ins of anything at all: they load, or a `PluginError` names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem import plugins
from evomem.errors import PluginError
from evomem.plugins.untrusted import read_bytes
from tests.plugins.test_plugins_untrusted import save_whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_whole(tmp_path_factory.mktemp("whole") / "plug")


def outcome(folder, files):
    """Load a folder of the given contents: None, or the message. Anything but a `PluginError` fails the test."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        manager = plugins.read(folder).manager
    except PluginError as error:
        return str(error)
    assert all(torch.isfinite(tensor).all() for tensor in manager.state_dict().values())
    return None


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["keydiff", "adakv", "namm"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "options", "inner", "budget", "every", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(
    field=st.sampled_from(["schema_version", "manager", "options", "allocation", "observes", "schedule", "budget"]),
    value=plain,
    option=st.sampled_from(
        [None, "features", "knots", "hidden", "allocation", "layers", "heads", "sinks", "budget", "every"]
    ),
)
def test_any_value_in_any_field(whole, tmp_path_factory, field, value, option):
    data = json.loads((whole / "config.json").read_text())
    if option is None:
        data[field] = value
    else:
        data["options"][option] = value
    folder = tmp_path_factory.mktemp("any")
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    message = outcome(folder, {**files, "config.json": json.dumps(data).encode()})
    assert message is None or any(f"{folder.name}/{name}: " in message for name in plugins.FILES[:2])


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(plugins.FILES[:3]), st.floats(0, 1), st.integers(0, 7), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_bits_that_flip_and_files_that_end(whole, tmp_path_factory, faults):
    files = {path.name: bytearray(path.read_bytes()) for path in whole.iterdir()}
    for name, place, bit, cut in faults:
        at = min(int(place * len(files[name])), len(files[name]) - 1)
        if at < 0:
            continue
        if cut:
            del files[name][at:]
        else:
            files[name][at] ^= 1 << bit
    message = outcome(tmp_path_factory.mktemp("bits"), files)
    damaged = {name for name, *_ in faults}
    if "config.json" in damaged:  # a size that changed is noticed at the tensors
        damaged.add("model.safetensors")
    assert message is None or any(name in message for name in damaged)


@settings(max_examples=60)
@given(name=st.sampled_from(plugins.FILES[:3]), content=st.binary(max_size=200))
def test_any_bytes_for_a_file(whole, tmp_path_factory, name, content):
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    message = outcome(tmp_path_factory.mktemp("bytes"), {**files, name: content})
    assert message is not None
    assert name in message


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])


@settings(max_examples=80)
@given(
    tensors=st.dictionaries(
        st.sampled_from(["weights", "inner", "bias", "outer", "log_shares", "x"]),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), dtypes),
        max_size=6,
    )
)
def test_any_tensors(whole, tmp_path_factory, tensors):
    made = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    message = outcome(tmp_path_factory.mktemp("tensors"), {**files, "model.safetensors": safetensors.torch.save(made)})
    expected = plugins.load(whole).state_dict()
    fits = {n: (t.shape, t.dtype) for n, t in expected.items()} == {n: (t.shape, t.dtype) for n, t in made.items()}
    assert (message is None) == fits
    assert message is None or "model.safetensors: " in message


def test_reading_stops_at_the_limit_whatever_the_file_says_of_its_size(tmp_path):
    (tmp_path / "x").write_bytes(b"0" * 100)
    assert read_bytes(tmp_path / "x", 100) == b"0" * 100
    with pytest.raises(PluginError, match="at most 99"):
        read_bytes(tmp_path / "x", 99)
    if Path("/proc/self/maps").exists():  # says that it has 0 bytes
        with pytest.raises(PluginError, match="at most 10"):
            read_bytes(Path("/proc/self/maps").resolve(), 10)
