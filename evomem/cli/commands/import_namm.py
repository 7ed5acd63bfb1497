"""CLI: the command ``import-namm``: a NAMM that others searched, in the published layout, becomes a plug-in.

Two layouts are read, from ``.npz``, ``.safetensors`` and ``.pt`` alike:

* a recording (`evomem.testing.namm`): ``theta``, the parameters in flat order, ``mean`` and ``var`` (17,) of the
  spectrogram;
* a checkpoint of the paper's own code ("An Evolved Universal Transformer Memory", arXiv 2410.13166): under
  ``evolution_state`` the search's ``mean`` and ``best_member``, and the normalisation as
  ``stored_buffers_to_save.…output_mean`` and ``…output_var`` (``best_stored_buffers_to_save.…`` for the best member),
  where ``…online_new_output_…`` counts as long as ``…output_num`` is zero. The rest is the search's own state.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.text import Text
from torch import Tensor

import evomem
from evomem import plugins
from evomem.cli.commands.overwriting import check_free
from evomem.errors import ConfigError
from evomem.files.reading import is_file, user_path
from evomem.managers import NAMM
from evomem.managers.vector import vector_size
from evomem.memory.observations.spectrum import BINS
from evomem.terminal import wide_console
from evomem.testing.namm import DAMAGE, PER_UPDATE

_STORED = "stored_buffers_to_save."
_LARGEST = 1 << 30
"""Bytes of a file, packed and unpacked: a checkpoint of the paper's has 200 MB."""
_SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")


def import_namm(
    source: str, out: Path, scorer: str, every: int | None, budget: int | None, vector: str, *, overwrite: bool = False
) -> None:
    """Write the plug-in and say where it is.

    Raises
    ------
    ConfigError : a plug-in is there and ``overwrite`` is not given.
    ConfigError : the file is not there, damaged, of another layout or length, or has values that are not finite.
    """
    check_free(out, overwrite=overwrite)
    manager, provenance = read_namm(user_path(source), scorer, every, budget, vector)
    plugins.save(manager, out, provenance)
    console = wide_console()
    console.print(Text(f"{out}: {', '.join(plugins.FILES)}"))
    console.print(Text(f'  python: import evomem; manager = evomem.load("{out}")'))


def read_namm(
    path: Path, scorer: str = "bam", every: int | None = 512, budget: int | None = None, vector: str = "mean"
) -> tuple[NAMM, dict[str, Any]]:
    """Return the NAMM of a file and its provenance.

    Parameters
    ----------
    scorer, every, budget : options of `NAMM`, which the file does not tell.
    vector : ``mean`` or ``best``: which of a checkpoint's two vectors, each with its own normalisation.

    Raises
    ------
    ConfigError : see `import_namm`.
    """
    arrays = _tensors(path)
    manager = NAMM(scorer=scorer, every=every, budget=budget)
    if "theta" in arrays:
        layout, name, mean, var = "recording", "theta", "mean", "var"
        unknown = [key for key in arrays if key not in ("theta", "mean", "var") and not key.startswith(PER_UPDATE)]
        if unknown:
            raise ConfigError(f"{path}: unknown keys {_listed(unknown)} beside theta, mean and var")
    else:
        layout, name = "checkpoint", {"mean": "mean", "best": "best_member"}[vector]
        if name not in arrays:
            raise ConfigError(
                f"{path}: unknown keys {_listed(arrays)}; expected theta, mean and var, or evolution_state with {name} "
                f"and {_STORED}…output_mean"
            )
        mean, var = _statistics(path, arrays, vector)
    manager.from_vector(_numbers(path, arrays, name, vector_size(manager)).numpy())
    variance = _numbers(path, arrays, var, BINS)
    if (variance < 0).any():
        raise ConfigError(f"{path}: {var}: {variance.min().item()} is negative; a variance is at least 0")
    manager.set_statistics(_numbers(path, arrays, mean, BINS), variance)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    imported = {"imported from": path.name, "layout": layout, "vector": name, "normalisation": mean, "sha256": digest}
    return manager, {"evomem_version": evomem.__version__, "experiment": f"NAMM of {path.name}", "imported": imported}


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return what is in the file by name; of a checkpoint, the search's state."""
    if not is_file(path):
        raise ConfigError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: {path.suffix or 'no ending'}; expected one of {', '.join(_SUFFIXES)}")
    try:
        content = _load(path)
    except (*DAMAGE, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: damaged, or not only numbers ({reason[:200]})") from None
    state = content.get("evolution_state", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: holds {type(content).__name__}; expected tensors by name")
    return {str(key).removeprefix("_orig_mod."): value for key, value in state.items() if isinstance(value, Tensor)}


def _load(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"{path}: has {path.stat().st_size:,} bytes; at most {_LARGEST:,} are read")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise ConfigError(f"{path}: would be {size:,} bytes unpacked; at most {_LARGEST:,} are read")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as loaded:
            return {name: torch.from_numpy(np.asarray(loaded[name])) for name in loaded.files if _wanted(name)}
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    # Nothing but tensors and numbers is built. A checkpoint's best score may be a numpy number, which is no more than
    # its bytes. Mapped, because most of its 200 MB is the search's covariance.
    scalar = np.float64(0).__reduce__()[0]
    names: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64"))]
    with torch.serialization.safe_globals(names + kinds):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)


def _wanted(name: str) -> bool:
    """Whether a member of an archive is needed: a recording's updates are large and are not."""
    return not name.startswith(PER_UPDATE)


def _statistics(path: Path, arrays: Mapping[str, Tensor], vector: str) -> tuple[str, str]:
    """Return the names of the spectrogram's mean and variance in a checkpoint."""
    prefixes = [f"best_{_STORED}", _STORED] if vector == "best" else [_STORED]
    for prefix in prefixes:
        means = [key for key in arrays if key.startswith(prefix) and key.endswith("output_mean")]
        normalised = [
            key for key in means if not key.endswith("online_new_output_mean") and arrays[key].numel() == BINS
        ]
        if len(normalised) > 1:
            raise ConfigError(
                f"{path}: {_listed(normalised)}: {len(normalised)} normalisations of {BINS} bins; expected one"
            )
        if normalised:
            stem = normalised[0].removesuffix("output_mean")
            count = arrays.get(f"{stem}output_num")
            if count is not None and not count.any():
                stem += "online_new_"
            names = f"{stem}output_mean", f"{stem}output_var"
            missing = [name for name in names if name not in arrays]
            if missing:
                raise ConfigError(f"{path}: {missing[0]}: is missing")
            return names
    raise ConfigError(
        f"{path}: no normalisation of {BINS} bins ({prefixes[0]}…output_mean), without which its numbers mean nothing"
    )


def _numbers(path: Path, arrays: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """Return a tensor (size,) in fp32, checked."""
    if name not in arrays:
        raise ConfigError(f"{path}: {name}: is missing")
    values = arrays[name]
    if not values.is_floating_point():
        raise ConfigError(f"{path}: {name}: has type {values.dtype}; expected floating-point numbers")
    if values.numel() != size or max(values.shape, default=0) != size:
        got = f"{values.numel():,} in the shape {tuple(values.shape)}"
        raise ConfigError(f"{path}: {name}: expected {size:,} numbers, got {got}; is --scorer right?")
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ConfigError(f"{path}: {name}: {bad} of {size:,} values are NaN or infinite")
    return values.detach().float().reshape(size).clone()


def _listed(names: Any) -> str:
    shown = [repr(str(name)[:60]) for name in list(names)[:6]]
    return ", ".join(shown) + (", …" if len(list(names)) > 6 else "") if shown else "(none)"
