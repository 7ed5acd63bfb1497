"""Memory: which configuration of a model has read a text; tensors of another one often fit, and mean something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from evomem.errors import CacheError
from evomem.files.strict_json import NotStrictError, parse_strict


class HasReader:
    """A cache that knows the configuration that its text was read with.

    Attributes
    ----------
    reader : fields of the configuration; None: nothing was read, or by no model.

    Class attributes
    ----------------
    saved_title : name of a saved cache in messages.
    """

    saved_title: ClassVar[str] = "saved memory"
    reader: dict[str, Any] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        raise NotImplementedError

    def require_reader(self, fields: Mapping[str, Any]) -> None:
        """Note the configuration that a text is read with.

        Tensors of another configuration often fit (other segments, another rate), and mean something else.

        Raises
        ------
        CacheError : the text was begun with another configuration, or it is not known with which.
        """
        fields = json.loads(json.dumps(fields))  # as a file gives them back
        if not self.get_seq_length():
            self.reader = dict(fields)
        if self.reader is None:
            raise CacheError(
                f"{self.saved_title}: 'reader' is missing, the configuration that the text was read with; read it again"
            )
        for name in sorted({*fields, *self.reader}):
            before, now = self.reader.get(name), fields.get(name)
            if before != now:
                raise CacheError(
                    f"this memory's text was read with {name} {before!r}, and the model has {now!r}: it would mean "
                    "something else there; read on with the model that began, or read the text again"
                )

    def reader_tensors(self) -> dict[str, Tensor]:
        """Return the configuration as ``reader``, (characters,) uint8: JSON; nothing where no model has read."""
        if self.reader is None or not self.get_seq_length():
            return {}
        return {"reader": torch.tensor(list(json.dumps(self.reader, sort_keys=True).encode()), dtype=torch.uint8)}

    def parsed_reader(self, said: Tensor | None) -> dict[str, Any] | None:
        """Return the configuration that ``reader`` of a saved cache says; None where there is none.

        Raises
        ------
        CacheError : it says no configuration.
        """
        if said is None:
            return None
        try:
            reader = parse_strict(bytes(said.tolist()).decode())
        except (NotStrictError, ValueError, TypeError):
            reader = None
        if said.dtype != torch.uint8 or not isinstance(reader, dict):
            raise CacheError(f"{self.saved_title}: 'reader' is no configuration of a model; the file is damaged")
        return reader
