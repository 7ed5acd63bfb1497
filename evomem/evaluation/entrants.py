"""Evaluation: the entrants of a comparison, each measured on every sample, in batches of about equal size."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from evomem.devices import CURES, out_of_memory
from evomem.errors import ConfigError, EvaluationError, OutOfMemoryError
from evomem.evaluation.evaluator import Evaluator, Reach
from evomem.evaluation.measurement import EXACT, HEAD_MEMORY, LOGLIK, Evaluation
from evomem.evaluation.oracle import evaluate_oracle
from evomem.evaluation.results import SampleFile
from evomem.evaluation.rows import Budget, Role, budget_size
from evomem.managers import MemoryManager
from evomem.memory.observations.repeated_attention import REPEATED
from evomem.tasks.base import Sample, Split, Task, at_hand
from evomem.tasks.chat import ChatTemplate

logger = logging.getLogger("evomem")

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""
ResultKey = tuple[str, str, str, Budget]
"""What evaluations are of: model, task, manager, budget."""

ROWS = 8
"""Managers that are evaluated as one batch, at most: enough to use the weights well, few enough for the memory."""

SPREAD = 4.0
"""Managers whose budgets differ by more are evaluated apart: a batch holds as many slots as its largest row."""


@dataclass(frozen=True)
class NamedManager:
    """A manager and its name in tables."""

    name: str
    manager: MemoryManager


@dataclass(frozen=True)
class Scenario:
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
    """The samples of a scenario.

    Attributes
    ----------
    remark : `Row.remark`.
    reach : how long they are, and what the model was made for.
    """

    scenario: Scenario
    samples: list[Sample]
    remark: str
    reach: Reach


@dataclass(frozen=True)
class Entrant:
    """A manager at a budget, in a comparison.

    Attributes
    ----------
    name : in tables.
    role : `evomem.evaluation.rows.Role`.
    budget : in slots or as a share; None: the manager takes none.
    manager : with that budget.
    """

    name: str
    role: Role
    budget: Budget
    manager: MemoryManager


def entrants_of(
    members: Sequence[NamedManager],
    role: Role,
    budgets: Sequence[Budget],
    own_budgets: Mapping[str, Sequence[Budget]] | None = None,
) -> list[Entrant]:
    """Return every manager at every budget (None: its own); a manager that takes no budget is there once.

    Parameters
    ----------
    own_budgets : by name, the budgets that stand in place of ``budgets``.

    Raises
    ------
    ConfigError : two managers have one name.
    """
    entrants: list[Entrant] = []
    for member in members:
        for budget in dict.fromkeys((own_budgets or {}).get(member.name, budgets)):
            entrants.append(_at_budget(member, role, budget))
    distinct = list({(entrant.name, entrant.budget): entrant for entrant in entrants}.values())
    twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        raise ConfigError(f"two managers of a comparison are called {twice[0]!r}")
    return distinct


def takes_budget(manager: MemoryManager) -> bool:
    """Whether a manager can be given a budget; the full cache and scores with a threshold of their own cannot."""
    if manager.options.budget is not None:
        return True
    return manager.name != "full" and _at_budget(NamedManager("", manager), "field", 1024).budget is not None


def _at_budget(member: NamedManager, role: Role, budget: Budget) -> Entrant:
    manager = member.manager
    if manager.name == "full":
        return Entrant(member.name, "full" if role == "field" else role, None, manager)
    if budget is None:
        return Entrant(member.name, role, manager.options.budget, manager)
    try:
        return Entrant(member.name, role, budget, manager.with_options(budget=budget))
    except ConfigError:
        if manager.options.budget is not None:
            raise
        return Entrant(member.name, role, None, manager)  # its own scores say how much it keeps


def measure(
    entrants: Sequence[Entrant],
    pools: Sequence[Pool],
    *,
    split: Split,
    seed: int,
    exact: bool,
    keep: Path | None,
    progress: Progress | None,
    finished: Path | None = None,
) -> dict[ResultKey, list[Evaluation]]:
    """Return every entrant's evaluations in every scenario, in the order of the samples.

    ``keep`` and ``finished`` are those of `evomem.evaluation.results.SampleFile`.
    """
    fingerprint = _fingerprint(entrants, [pool.scenario for pool in pools], split, seed, exact)
    digests = "".join(sample.digest for pool in pools for sample in pool.samples)
    fingerprint["samples"] = sha256(digests.encode()).hexdigest()[:16]
    results: dict[ResultKey, list[Evaluation]] = {}
    done, total = 0, sum(len(pool.samples) for pool in pools)
    with SampleFile(keep, fingerprint, finished) as file:
        for number, pool in enumerate(pools):
            scenario = pool.scenario
            # Blocks are the same ones when a comparison goes on: a batch's shape moves the last digits.
            size = max(1, scenario.evaluator.samples_at_once(min(len(entrants), ROWS)))
            for begin in range(0, len(pool.samples), size):
                block = pool.samples[begin : begin + size]
                known = [file.get(number, sample.id) for sample in block]
                measured: list[list[Evaluation]] = []
                if None in known:
                    alone = len(block) == 1
                    measured = (
                        [on_sample(entrants, scenario, block[0], exact)]
                        if alone
                        else on_samples(entrants, scenario, block, exact)
                    )
                for place, sample in enumerate(block):
                    evaluations = known[place]
                    if evaluations is None:
                        evaluations = measured[place]
                        require_numbers([entrant.name for entrant in entrants], scenario, sample, evaluations)
                        file.append(number, sample.id, evaluations)
                    for entrant, evaluation in zip(entrants, evaluations, strict=True):
                        key = (scenario.model, scenario.task, entrant.name, entrant.budget)
                        results.setdefault(key, []).append(evaluation)
                    done += 1
                    if progress is not None:
                        progress(done, total)
    return results


def require_numbers(
    names: Sequence[str], scenario: Scenario, sample: Sample, evaluations: Sequence[Evaluation]
) -> None:
    """Raise `EvaluationError` if a manager's evaluation on a sample is no number: a mean would hide whose it is."""
    for name, evaluation in zip(names, evaluations, strict=True):
        for field in ("loglik", "exact", "slots", "bytes_peak", "bytes_mean"):
            value = getattr(evaluation, field)
            if value is not None and not math.isfinite(value):
                dtype = str(scenario.evaluator.loaded.model.dtype).removeprefix("torch.")
                raise EvaluationError(
                    f"{name} on {scenario.model}, {scenario.task}, sample {sample.id}: {field} is {value} (weights in "
                    f"{dtype}). Numbers of the model or of the manager overflow: try --dtype float32, or leave "
                    f"{name} out"
                )


def pools_of(scenarios: Sequence[Scenario], count: int, split: Split, seed: int, *, exact: bool) -> list[Pool]:
    """Return the samples of every scenario, as many as are asked for or as there are.

    Raises
    ------
    ConfigError : fewer than one sample is asked for.
    TaskError : a split is empty, or a sample is longer than a model can read.
    """
    if count < 1:
        raise ConfigError(f"samples: {count}; give at least 1")
    pools = []
    for scenario in scenarios:
        task = scenario.subject_task
        samples = task.samples(split, at_hand(task, split, count), seed)
        remarks = [str(getattr(task, "note", ""))]
        if len(samples) < count:
            remarks.append(f"{len(samples)} of {count} samples: the {split} split has no more")
        reach = scenario.evaluator.check_positions(samples, exact=exact and task.has_exact)
        pools.append(Pool(scenario, samples, "; ".join(filter(None, remarks)), reach))
    return pools


def on_sample(entrants: Sequence[Entrant], scenario: Scenario, sample: Sample, exact: bool) -> list[Evaluation]:
    """Evaluate all entrants on one sample, see `on_samples`."""
    return on_samples(entrants, scenario, [sample], exact)[0]


def on_samples(
    entrants: Sequence[Entrant], scenario: Scenario, samples: Sequence[Sample], exact: bool
) -> list[list[Evaluation]]:
    """Evaluate all entrants on samples: a context is read once, the batches hold rows of about the same size.

    Returns per sample one evaluation an entrant.
    """
    observes = frozenset[str]().union(*(entrant.manager.observes for entrant in entrants))
    measurement = (EXACT if exact else LOGLIK).also(HEAD_MEMORY).observing(observes)
    task, evaluator = scenario.subject_task, scenario.evaluator
    by_entrant: dict[int, Sequence[Evaluation]] = {}
    for index, entrant in enumerate(entrants):
        if entrant.role == "oracle":
            by_entrant[index] = [
                evaluate_oracle(evaluator, sample, task, entrant.budget, measurement) for sample in samples
            ]
    names = ", ".join(sample.id for sample in samples)
    batches = list(batches_of(entrants))
    while batches:
        batch = batches.pop(0)
        members = [entrants[index].manager for index in batch]
        try:
            evaluations = evaluator.evaluate_together(members, samples, task, measurement)
        except Exception as error:
            ended = out_of_memory(error, f"sample {names}: {len(batch)} managers as one batch")
            if ended is None:
                raise
            if len(batch) == 1:
                name = entrants[batch[0]].name
                raise OutOfMemoryError(
                    f"{ended} {name} alone does not fit. {CURES[ended.memory]}", ended.memory
                ) from None
            half = len(batch) // 2
            logger.warning("%s They are measured as two batches", ended)
            batches[:0] = [batch[:half], batch[half:]]
            continue
        for index, of_entrant in zip(batch, zip(*evaluations, strict=True), strict=True):
            by_entrant[index] = of_entrant
            if REPEATED in entrants[index].manager.observes:
                by_entrant[index] = [_repeated(*pair, evaluator) for pair in zip(of_entrant, samples, strict=True)]
    evaluator.store.close()
    return [[by_entrant[index][place] for index in range(len(entrants))] for place in range(len(samples))]


def _repeated(evaluation: Evaluation, sample: Sample, evaluator: Evaluator) -> Evaluation:
    """Return an evaluation that says how many tokens were read again before the decision."""
    again = evaluator.repetition(evaluator.tokens(sample).read).shape[1]
    return replace(evaluation, values={**evaluation.values, "repeated_tokens": float(again)})


def batches_of(entrants: Sequence[Entrant]) -> Iterator[list[int]]:
    """Yield the indices of entrants that are evaluated together; those that may keep everything are last and alone.

    Entrants of equal budget are ordered by what they observe: streaming evaluates only those that observe the same as
    one batch.
    """

    def order(index: int) -> tuple[float, list[str]]:
        return budget_size(entrants[index].budget), sorted(entrants[index].manager.observes)

    managers = [index for index, entrant in enumerate(entrants) if entrant.role != "oracle"]
    sized = [index for index in managers if entrants[index].budget is not None]
    batch: list[int] = []
    for index in sorted(sized, key=order):
        if batch and (
            len(batch) == ROWS or budget_size(entrants[index].budget) > SPREAD * budget_size(entrants[batch[0]].budget)
        ):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
    yield from ([index] for index in managers if entrants[index].budget is None)


def _fingerprint(
    entrants: Sequence[Entrant], scenarios: Sequence[Scenario], split: Split, seed: int, exact: bool
) -> dict[str, Any]:
    """Return what measurements depend on; a file of finished samples is continued only if this is the same."""

    def digest(manager: MemoryManager) -> str:
        state = sha256()
        for name, tensor in manager.state_dict().items():
            content = (
                tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            )  # numpy has no bfloat16
            state.update(name.encode() + content.numpy().tobytes())
        return state.hexdigest()[:16]

    return {
        "split": str(split),
        "seed": seed,
        "exact": exact,
        "managers": [[e.name, e.budget, e.manager.describe(), digest(e.manager)] for e in entrants],
        "places": [
            {
                "model": scenario.model,
                "digest": scenario.evaluator.loaded.digest,
                "dtype": str(scenario.evaluator.loaded.model.dtype),
                "task": [scenario.task, scenario.subject_task.name, scenario.subject_task.describe()],
                "protocol": str(scenario.evaluator.protocol),
                # Only where there is one, so that older files without one are continued.
                **({"prefix": list(prefix)} if (prefix := scenario.evaluator.encoder.prefix) else {}),
                **({"chat_template": scenario.chat_template} if scenario.chat_template else {}),
            }
            for scenario in scenarios
        ],
    }
