"""Write golden files, the same bytes at every time; see make.py."""

from __future__ import annotations

import json
import zipfile

import torch


def made_with():
    """What decides over the last bit of a number besides the code."""
    return {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}


def write(path, value):
    """Write JSON, one case a line."""
    cases = value.pop("cases", None)
    text = json.dumps(value, indent=1)
    if cases is not None:
        lines = ",\n  ".join(json.dumps(case) for case in cases)
        text = text[:-2] + f',\n "cases": [\n  {lines}\n ]\n}}'
    path.write_text(text + "\n")


def pack(folder, path):
    """Pack a folder, the same bytes at every time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".lock":
                entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (2020, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
