"""Report: under which protocol a manager is measured on a model whose memory may be of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from evomem.evaluation.measurement import EvaluationProtocol
from evomem.evaluation.streams import reads_streams
from evomem.memory.kv.attach import has_own_memory
from evomem.models import LoadedModel
from evomem.models.pretrained.folders import model_type
from evomem.report.subjects import Subject
from evomem.tasks.building import is_stream

MemoryKind = Literal["a KV cache", "a memory that reads streams of requests", "a memory of the model's own"]

DEFAULTS: dict[MemoryKind, EvaluationProtocol] = {
    "a KV cache": EvaluationProtocol(),
    "a memory that reads streams of requests": EvaluationProtocol(kind="streaming", every=1),
    "a memory of the model's own": EvaluationProtocol(kind="streaming", every=16),
}
"""The protocol of each kind of memory where no search was on one; compress_once is for a KV cache only."""

_KINDS: dict[str, MemoryKind] = {
    "evomem_pair_memory": "a memory that reads streams of requests",
    "evomem_mosaic": "a memory of the model's own",
    "evomem_memory_matrix": "a memory of the model's own",
    "evomem_fam": "a memory of the model's own",
    "evomem_titans": "a memory of the model's own",
}
"""Of evomem's own architectures, those that have no KV cache."""


def memory_kind(loaded: LoadedModel) -> MemoryKind:
    """Return what kind of memory a model has."""
    if reads_streams(loaded):
        return "a memory that reads streams of requests"
    return "a memory of the model's own" if has_own_memory(loaded.model) else "a KV cache"


def memory_kind_of(name: str) -> MemoryKind:
    """Return what kind of memory the model called ``name`` has, from its configuration alone.

    One that is not at hand, a hub id among them, has a KV cache: the other architectures are evomem's own.
    """
    return _KINDS.get(model_type(name), "a KV cache")


def default_protocol(loaded: LoadedModel, subjects: Sequence[Subject]) -> tuple[EvaluationProtocol, str]:
    """Return the protocol under which subjects are measured on a model when the user names none, and what to say of it.

    In this order: that of the first subject found on this model, on one with a memory of this kind, that of
    `DEFAULTS`. So a search on streams does not bring a decision every request to a language model.

    Returns
    -------
    The protocol, and a sentence where it is not the first subject's; "" where it is.
    """
    kind = memory_kind(loaded)
    first = next((subject for subject in subjects if subject.protocol is not None), None)
    known = [(subject, *one) for subject in subjects for one in _searched(subject)]
    same_model = [(subject, protocol) for subject, model, _, protocol in known if model == loaded.name]
    same_kind = [(subject, protocol) for subject, _, its_kind, protocol in known if its_kind == kind]
    chosen = next(iter([*same_model, *same_kind]), None)
    protocol = DEFAULTS[kind] if chosen is None else chosen[1]
    if first is None or first.protocol == protocol:
        return protocol, ""
    whose = "the default there" if chosen is None else f"as {chosen[0].name} was searched"
    return protocol, (
        f"{loaded.name} has {kind} and is measured under {protocol}, {whose}; {first.name} was searched under "
        f"{first.protocol}. Name another one with --protocol"
    )


def _searched(subject: Subject) -> list[tuple[str, MemoryKind, EvaluationProtocol]]:
    """Return the models that a subject was found on, what memory each has, and the protocol there."""
    if subject.protocol is None:
        return []
    if not subject.models:  # an old plug-in: its tasks say what it read
        streams = bool(subject.tasks) and all(is_stream(task.spec) for task in subject.tasks)
        return [("", "a memory that reads streams of requests" if streams else "a KV cache", subject.protocol)]
    return [(name, memory_kind_of(name), subject.protocol_on(name) or subject.protocol) for name in subject.models]
