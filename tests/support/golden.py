"""What the code of commit 1ffdb50 decided: tests/data/golden, written by the script that lies there."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def told(name):
    """Return what a JSON file of the golden ones says."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def arrays(name):
    """Return the tensors of an npz file by name."""
    with np.load(GOLDEN / f"{name}.npz") as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def unpacked(name, folder):
    """Unpack a zip file into a folder, and return it."""
    with zipfile.ZipFile(GOLDEN / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder


def same_numbers(found, expected, made_with):
    """Compare to the bit where both were made by the same torch on the same kind of processor, else nearly."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    if made_with == {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
