"""Memory: what the calls around an attention say: whether a cache of slots was given, and what `generate` is doing.

transformers hands an attention function nothing but tensors. That a model, `generate` or a wrapper was given a cache
and exchanged or dropped it on the way (long rope, prefix tuning, gradient checkpointing) is known to the calls that the
attention runs in, and to nobody else. So their arguments are read from Python's stack; nothing is patched or hooked.
This happens once in a forward pass, and only where the answer is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from evomem.memory.kv.cache import SlotCache


def module_calls() -> Iterator[FrameType]:
    """Yield the calls of modules' methods that this code runs in, from the innermost on.

    They end where another object called the model for a purpose of its own: a logits processor that runs an unguided
    twin, a candidate generator with its assistant, a program.
    """
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        names = frame.f_code.co_varnames
        if frame.f_code.co_argcount and names[0] == "self":
            if isinstance(frame.f_locals.get("self"), nn.Module):
                inside = True
                yield frame
            elif inside:
                return
        frame = frame.f_back


def given_cache(module: nn.Module) -> SlotCache | None:
    """Return the cache of slots, for the model of this attention, that a call around it was given as an argument."""
    from evomem.memory.kv.cache import SlotCache

    for frame in module_calls():
        for value in _arguments(frame):
            if isinstance(value, SlotCache) and value.is_for(module):
                return value
    return None


def _arguments(frame: FrameType) -> Iterable[Any]:
    """Values of a call's parameters, those in ``*args`` and in dictionaries of further ones too."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)  # *args, **kwargs
    values = frame.f_locals
    for name in code.co_varnames[:count]:
        value = values.get(name)
        yield value
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, tuple):
            yield from value


@dataclass(frozen=True)
class Generating:
    """What a `generate` around a forward pass is doing with it.

    Attributes
    ----------
    takes_back : it verifies guesses (an assistant, prompt lookup) and crops those that are wrong.
    unfinished : it reads a prompt in chunks (``prefill_chunk_size``), and more of them follow.
    uses_cache : False with ``use_cache=False``: it reads the whole text again for every token.
    """

    takes_back: bool = False
    unfinished: bool = False
    uses_cache: bool = True


def generating() -> Generating:
    """Tell what the `generate` is doing that this code runs in; where there is none, that it does nothing special.

    Names of transformers' own, from 5.17 to 5.24. Under other names a chunk is a reading of its own: less is kept, and
    never more.
    """
    takes_back, unfinished, uses_cache = False, False, True
    for frame in module_calls():
        values = frame.f_locals
        if frame.f_code.co_name == "_assisted_decoding":
            takes_back = True
        if frame.f_code.co_name == "_prefill" and "input_chunk" in values and (chunks := values.get("input_chunks")):
            unfinished = values["input_chunk"] is not chunks[-1]
        if isinstance(options := values.get("model_kwargs"), dict) and options.get("use_cache") is False:
            uses_cache = False
    return Generating(takes_back, unfinished, uses_cache)
