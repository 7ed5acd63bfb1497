"""Evaluation: managers side by side on the same samples at the same budgets, with paired intervals."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from evomem.devices import CURES, named, out_of_memory
from evomem.errors import ConfigError, EvaluationError, OutOfMemoryError
from evomem.evaluation.evaluator import Evaluator, Reach
from evomem.evaluation.measurement import EXACT, LOGLIK, Evaluation
from evomem.evaluation.oracle import FutureOracle, evaluate_oracle
from evomem.evaluation.results import SampleFile
from evomem.evaluation.rows import Budget, Measured, Role, Row, budget_size, rows_of
from evomem.managers import MemoryManager, build, names
from evomem.tasks.base import Sample, Split, Task, at_hand
from evomem.tasks.chat import ChatTemplate

logger = logging.getLogger("evomem")

Progress = Callable[[int, int], None]

ROWS = 8
"""Managers that are evaluated as one batch, at most: enough to use the weights well, few enough for the memory."""

SPREAD = 4.0
"""Managers whose budgets differ by more are evaluated apart: a batch holds as many slots as its largest row."""

_NOT_IN_ALL = frozenset({"full", "namm", "feature_scorer"})
"""Managers that "all heuristics" leaves out: the reference, which is always there, and those that a search makes."""


@dataclass(frozen=True)
class NamedManager:
    """A manager and its name in tables."""

    name: str
    manager: MemoryManager


@dataclass(frozen=True)
class Place:
    """Where managers are compared: a model under a protocol, and a task.

    Attributes
    ----------
    model, task : names in tables.
    evaluator : of the model; what its store holds is forgotten after every sample.
    subject_task : samples and their metric.
    """

    model: str
    task: str
    evaluator: Evaluator
    subject_task: Task

    @property
    def chat_template(self) -> str:
        """Hash of the chat template that the task asks in; "" if it does not."""
        chat: ChatTemplate | None = getattr(self.subject_task, "chat", None)
        return "" if chat is None else chat.digest


@dataclass(frozen=True)
class Pool:
    """The samples of a place.

    Attributes
    ----------
    remark : `Row.remark`.
    reach : how long they are, and what the model was made for.
    """

    place: Place
    samples: list[Sample]
    remark: str
    reach: Reach


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes
    ----------
    subject : name of the manager that the others are set against; None for a plain evaluation.
    rows : by model, task and budget, the largest log-likelihood first.
    evaluations : per row's key (model, task, manager, budget), its evaluations in the order of the samples.
    measured : what the rows were made of.
    """

    subject: str | None
    rows: list[Row]
    evaluations: dict[tuple[str, str, str, Budget], list[Evaluation]]
    measured: list[Measured]


@dataclass(frozen=True)
class _Entrant:
    name: str
    role: Role
    budget: Budget
    manager: MemoryManager


def field_of(against: str | Sequence[str] | None) -> list[NamedManager]:
    """Return the managers that subjects are set against.

    Parameters
    ----------
    against : specs such as ``keydiff`` or ``adakv(keydiff)``; None or ``all``: every heuristic, and ``adakv(keydiff)``.

    Raises
    ------
    ConfigError : a spec cannot be read, or names no manager.
    """
    specs = [against] if isinstance(against, str) else list(against) if against is not None else ["all"]
    chosen: list[str] = []
    for spec in specs:
        if spec == "all":
            heuristics = [name for name in names() if name not in _NOT_IN_ALL]
            chosen += [f"{name}(keydiff)" if name == "adakv" else name for name in heuristics]
        elif spec != "full":
            chosen.append(spec)
    return [NamedManager(spec, build(spec)) for spec in dict.fromkeys(chosen)]


def compare(
    subjects: Sequence[NamedManager],
    places: Sequence[Place],
    *,
    samples: int,
    budgets: Sequence[Budget] = (None,),
    against: str | Sequence[str] | None = None,
    split: Split = Split.SEALED,
    seed: int = 0,
    exact: bool = True,
    oracle: bool = False,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate subjects, field and the full cache on the same samples.

    Parameters
    ----------
    subjects : what the comparison is about; the first is the one that differences are taken of.
    places : models and tasks.
    samples : per task; fewer where a split has no more (`Row.remark`).
    budgets : every manager is evaluated at each; None: at its own. A manager that takes no budget is evaluated as it
        is, once. So is the full cache; without a field it is left out too.
    against : the field, see `field_of`; an empty list: none.
    exact : also generate, for the exact metric.
    oracle : at every budget also the decision that knows what question and answer will attend to (`FutureOracle`): no
        manager can know that, so it is a mark, and no competitor.
    keep : file to which every finished sample is appended; a comparison that was killed goes on from it.
    progress : called with samples done and samples in all.

    Raises
    ------
    ConfigError : two managers have the same name, or ``keep`` holds another comparison.
    TaskError : a split has no samples, or one is longer than a model can read.
    EvaluationError : a manager's likelihood, score or memory on a sample is NaN or infinite.
    """
    places, budgets = _once(places, budgets)
    field = field_of(against)
    taken = {subject.name for subject in subjects}
    field = [member for member in field if member.name not in taken]
    entrants = _entrants(subjects, "subject", budgets) + _entrants(field, "field", budgets)
    if "full" not in taken and field:
        entrants += _entrants([NamedManager("full", build("full"))], "full", budgets)
    if oracle:
        if any(place.evaluator.protocol.kind != "compress_once" for place in places):
            raise ConfigError("oracle: what will be attended to is known under the protocol compress_once only")
        given = dict.fromkeys(entrant.budget for entrant in entrants if entrant.budget is not None)
        entrants += [_Entrant(FutureOracle.name, "oracle", budget, FutureOracle((), budget=budget)) for budget in given]
    pools = draw(places, samples, split, seed, exact=exact)
    found = measure(entrants, pools, split=split, seed=seed, exact=exact, keep=keep, progress=progress)
    return _comparison(subjects[0].name, subjects[0].name, entrants, pools, found, split)


def evaluate(
    subject: NamedManager,
    places: Sequence[Place],
    *,
    samples: int,
    budgets: Sequence[Budget] = (None,),
    split: Split = Split.SEALED,
    seed: int = 0,
    exact: bool = True,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate one manager, without a comparison; see `compare`."""
    places, budgets = _once(places, budgets)
    entrants = _entrants([subject], "subject", budgets)
    pools = draw(places, samples, split, seed, exact=exact)
    found = measure(entrants, pools, split=split, seed=seed, exact=exact, keep=keep, progress=progress)
    return _comparison(None, subject.name, entrants, pools, found, split)


def _once(places: Sequence[Place], budgets: Sequence[Budget]) -> tuple[list[Place], list[Budget]]:
    """Return places and budgets without those that are named again: twice the samples would halve an interval.

    Raises
    ------
    ConfigError : 1 and 1.0, a slot and everything, which the rows could not tell apart.
    """
    distinct = list({(type(budget), budget): budget for budget in budgets}.values())
    if len(set(distinct)) < len(distinct):
        raise ConfigError("budgets: 1 is one slot and 1.0 is everything; compare at one after the other")
    found: dict[tuple[str, str], list[str]] = {}
    kept = []
    for place in places:
        what = json.dumps([place.subject_task.name, place.subject_task.describe()], sort_keys=True, default=str)
        there = found.setdefault((place.model, place.task), [])
        if what not in there:
            there.append(what)
            # Tasks that differ in options which their title does not tell are two, and their samples do not mix.
            kept.append(place if len(there) == 1 else replace(place, task=f"{place.task} ({len(there)})"))
    return kept, distinct


def _entrants(members: Sequence[NamedManager], role: Role, budgets: Sequence[Budget]) -> list[_Entrant]:
    entrants: list[_Entrant] = []
    for member in members:
        for budget in dict.fromkeys(budgets):
            entrants.append(_at_budget(member, role, budget))
    distinct = list({(entrant.name, entrant.budget): entrant for entrant in entrants}.values())
    twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        raise ConfigError(f"two managers of a comparison are called {twice[0]!r}")
    return distinct


def _at_budget(member: NamedManager, role: Role, budget: Budget) -> _Entrant:
    manager = member.manager
    if manager.name == "full":
        return _Entrant(member.name, "full" if role == "field" else role, None, manager)
    if budget is None:
        return _Entrant(member.name, role, manager.options.budget, manager)
    try:
        return _Entrant(member.name, role, budget, manager.with_options(budget=budget))
    except ConfigError:
        if manager.options.budget is not None:
            raise
        return _Entrant(member.name, role, None, manager)  # its own scores say how much it keeps


def measure(
    entrants: Sequence[_Entrant],
    pools: Sequence[Pool],
    *,
    split: Split,
    seed: int,
    exact: bool,
    keep: Path | None,
    progress: Progress | None,
) -> dict[tuple[str, str, str, Budget], list[Evaluation]]:
    """Return every entrant's evaluations on every place, in the order of the samples."""
    what = _fingerprint(entrants, [pool.place for pool in pools], split, seed, exact)
    digests = "".join(sample.digest for pool in pools for sample in pool.samples)
    what["samples"] = sha256(digests.encode()).hexdigest()[:16]
    found: dict[tuple[str, str, str, Budget], list[Evaluation]] = {}
    done, total = 0, sum(len(pool.samples) for pool in pools)
    with SampleFile(keep, what) as file:
        for number, pool in enumerate(pools):
            place = pool.place
            for sample in pool.samples:
                evaluations = file.get(number, sample.id)
                if evaluations is None:
                    evaluations = _on_sample(entrants, place, sample, exact)
                    require_numbers([entrant.name for entrant in entrants], place, sample, evaluations)
                    file.put(number, sample.id, evaluations)
                for entrant, evaluation in zip(entrants, evaluations, strict=True):
                    key = (place.model, place.task, entrant.name, entrant.budget)
                    found.setdefault(key, []).append(evaluation)
                done += 1
                if progress is not None:
                    progress(done, total)
    return found


def require_numbers(names: Sequence[str], place: Place, sample: Sample, evaluations: Sequence[Evaluation]) -> None:
    """Raise `EvaluationError` if a manager's evaluation on a sample is no number: a mean would hide whose it is."""
    for name, evaluation in zip(names, evaluations, strict=True):
        for field in ("loglik", "exact", "slots", "bytes_peak", "bytes_mean"):
            value = getattr(evaluation, field)
            if value is not None and not math.isfinite(value):
                dtype = str(place.evaluator.loaded.model.dtype).removeprefix("torch.")
                raise EvaluationError(
                    f"{name} on {place.model}, {place.task}, sample {sample.id}: {field} is {value} (weights in "
                    f"{dtype}). Numbers of the model or of the manager overflow: try --dtype float32, or leave "
                    f"{name} out"
                )


def draw(places: Sequence[Place], count: int, split: Split, seed: int, *, exact: bool) -> list[Pool]:
    """Return the samples of every place, as many as are asked for or as there are.

    Raises
    ------
    ConfigError : fewer than one sample is asked for.
    TaskError : a split is empty, or a sample is longer than a model can read.
    """
    if count < 1:
        raise ConfigError(f"samples: {count}; give at least 1")
    pools = []
    for place in places:
        task = place.subject_task
        samples = task.samples(split, at_hand(task, split, count), seed)
        remarks = [str(getattr(task, "note", ""))]
        if len(samples) < count:
            remarks.append(f"{len(samples)} of {count} samples: the {split} split has no more")
        reach = place.evaluator.check_positions(samples, exact=exact and task.has_exact)
        pools.append(Pool(place, samples, "; ".join(filter(None, remarks)), reach))
    return pools


def _on_sample(entrants: Sequence[_Entrant], place: Place, sample: Sample, exact: bool) -> list[Evaluation]:
    """Evaluate all entrants on one sample: the context is read once, the batches hold rows of about the same size."""
    observes = frozenset[str]().union(*(entrant.manager.observes for entrant in entrants))
    wanted = (EXACT if exact else LOGLIK).observing(observes)
    found: dict[int, Evaluation] = {}
    for index, entrant in enumerate(entrants):
        if entrant.role == "oracle":
            found[index] = evaluate_oracle(place.evaluator, sample, place.subject_task, entrant.budget, wanted)
    chunks = list(_chunks(entrants))
    while chunks:
        chunk = chunks.pop(0)
        members = [entrants[index].manager for index in chunk]
        try:
            results = place.evaluator.evaluate(members, sample, place.subject_task, wanted)
        except Exception as error:
            ended = out_of_memory(error, f"sample {sample.id}: {len(chunk)} managers as one batch")
            if ended is None:
                raise
            if len(chunk) == 1:
                name = entrants[chunk[0]].name
                raise OutOfMemoryError(
                    f"{ended} {name} alone does not fit. {CURES[ended.memory]}", ended.memory
                ) from None
            half = len(chunk) // 2
            logger.warning("%s They are measured as two batches", ended)
            chunks[:0] = [chunk[:half], chunk[half:]]
            continue
        found.update(zip(chunk, results, strict=True))
    place.evaluator.store.close()
    return [found[index] for index in range(len(entrants))]


def _chunks(entrants: Sequence[_Entrant]) -> Iterator[list[int]]:
    """Places of entrants that are evaluated together; those that may keep everything are last and alone.

    Of equal budgets, those that observe the same come together: streaming evaluates only them as one batch.
    """

    def order(index: int) -> tuple[float, list[str]]:
        return budget_size(entrants[index].budget), sorted(entrants[index].manager.observes)

    ours = [index for index, entrant in enumerate(entrants) if entrant.role != "oracle"]
    sized = [index for index in ours if entrants[index].budget is not None]
    chunk: list[int] = []
    for index in sorted(sized, key=order):
        if chunk and (
            len(chunk) == ROWS or budget_size(entrants[index].budget) > SPREAD * budget_size(entrants[chunk[0]].budget)
        ):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk
    yield from ([index] for index in ours if entrants[index].budget is None)


def _fingerprint(
    entrants: Sequence[_Entrant], places: Sequence[Place], split: Split, seed: int, exact: bool
) -> dict[str, Any]:
    """What measurements depend on: a file of finished samples is only gone on with if this is the same."""

    def digest(manager: MemoryManager) -> str:
        state = sha256()
        for name, tensor in manager.state_dict().items():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
            state.update(name.encode() + content.numpy().tobytes())
        return state.hexdigest()[:16]

    return {
        "split": str(split),
        "seed": seed,
        "exact": exact,
        "managers": [[e.name, e.budget, e.manager.describe(), digest(e.manager)] for e in entrants],
        "places": [
            {
                "model": place.model,
                "digest": place.evaluator.loaded.digest,
                "dtype": str(place.evaluator.loaded.model.dtype),
                "task": [place.task, place.subject_task.name, place.subject_task.describe()],
                "protocol": str(place.evaluator.protocol),
                # Only where there is one, so that older files without one are gone on with.
                **({"prefix": list(prefix)} if (prefix := place.evaluator.encoder.prefix) else {}),
                **({"chat_template": place.chat_template} if place.chat_template else {}),
            }
            for place in places
        ],
    }


def _comparison(
    subject: str | None,
    first: str,
    entrants: Sequence[_Entrant],
    pools: Sequence[Pool],
    found: dict[tuple[str, str, str, Budget], list[Evaluation]],
    split: Split,
) -> Comparison:
    rows: list[Row] = []
    measured: list[Measured] = []
    for pool in pools:
        place, reach = pool.place, pool.reach
        here = [
            Measured(
                model=place.model,
                task=place.task,
                manager=entrant.name,
                budget=entrant.budget,
                protocol=str(place.evaluator.protocol),
                split=str(split),
                role=entrant.role,
                evaluations=found[place.model, place.task, entrant.name, entrant.budget],
                dtype=place.evaluator.loaded.dtype,
                device=named(place.evaluator.loaded.devices),
                prefix=place.evaluator.encoder.spelled,
                chat_template=place.chat_template,
                remark=pool.remark,
                longest=None if reach.limit is None else reach.longest,
                positions=reach.limit,
            )
            for entrant in entrants
        ]
        rows += rows_of(first, here)
        measured += here
    return Comparison(subject, rows, found, measured)
