r"""Plug-in: managed memory as a model of lm-evaluation-harness.

The harness knows no way to announce a model from outside; this module announces it and hands over to the harness's own
command line::

    python -m evomem.plugins.lm_eval --model evomem \
        --model_args pretrained=smollm2-135m,manager=my-plugin,budget=128 --tasks my_task --include_path tasks/
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evomem.errors import ConfigError, EvomemError
from evomem.files.reading import is_folder, user_path
from evomem.files.strict_json import shown
from evomem.managers import MemoryManager, build
from evomem.memory import SlotCache, check_supported
from evomem.memory.kv.versions import passed
from evomem.models.loading import exactly
from evomem.models.pretrained.folders import resolve
from evomem.plugins import load

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError(
        f"lm-evaluation-harness cannot be imported here ({error}). To use it: pip install 'lm_eval[hf]'"
    ) from error

Request = tuple[Any, list[int], list[int]]
"""What the harness's text was (None for a window of a longer one), tokens of the context, tokens to be scored."""


@register_model("evomem")
class EvomemLM(HFLM):  # type: ignore[misc]
    """The harness's own ``hf`` model, with a manager in charge of its memory.

    The context is read but for its last token, the manager decides, and the rest is read with what was kept: every
    token that is scored or generated is predicted from the managed memory. This is what `evomem.evaluation.Evaluator`
    measures in ``query_aware`` mode, since the harness hands over context and question as one text. With
    ``manager=full`` the figures are those of ``hf``.

    Parameters
    ----------
    pretrained : as of ``hf``: a folder, a hub id; also an alias of ``evomem models``; or a loaded model.
    manager : a plug-in (folder, or repository ``owner/name``), or a spec such as ``keydiff``. The harness cuts its
        ``--model_args`` at commas and equals signs: give a spec with options as JSON,
        ``--model_args '{"pretrained": ..., "manager": "adakv(snapkv, safeguard=0.3)"}'``.
    budget : slots per head, or share of the tokens; overrides the manager's own.
    every : decide every so many tokens; 0 for once, after the context; None leaves it as the manager has it.
    **options : as of ``hf``. ``batch_size=auto`` is refused.

    Raises
    ------
    ConfigError : of manager, budget, every or batch size; a rolling likelihood with a manager that decides once.
    PluginError, ModelError : the plug-in or the model cannot be read.
    """

    def __init__(
        self,
        pretrained: Any,
        manager: str | MemoryManager = "full",
        budget: int | float | None = None,
        every: int | None = None,
        **options: Any,
    ) -> None:
        if str(options.get("batch_size", 1)).startswith("auto"):
            raise ConfigError("batch_size: 'auto' measures a model without a manager; give a number")
        self.manager = _manager(manager, budget, every)
        with exactly(f"model {pretrained}" if isinstance(pretrained, str) else "model"):
            super().__init__(str(resolve(pretrained)) if isinstance(pretrained, str) else pretrained, **options)
        check_supported(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results, the manager among it."""
        return {**super().get_model_info(), "manager": self.manager.describe()}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, window by window; there is no context to decide about first."""
        if self.manager.schedule.every is None and self.manager.name != "full":
            raise ConfigError(
                f"manager {self.manager.name!r} decides once, after a context, and a rolling likelihood has none; "
                "give every=N, so that it decides while the text is read"
            )
        for request in requests:
            (text,) = request.args
            if not self.tok_encode(text):
                raise ConfigError(_nothing("text", text))
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding says the same) of every request.

        Requests of one context are scored on one reading of it.

        Raises
        ------
        ConfigError : a choice or a context has no token; the likelihood of nothing would be the largest there is.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, (texts, context, continuation) in enumerate(requests):
            for what, tokens in (("choice", continuation), ("context", context)):
                if not tokens:
                    raise ConfigError(_nothing(what, texts))
            room = self.max_length + 1 - len(continuation)  # too long a context loses its beginning, as with ``hf``
            if room < 1:
                raise ConfigError(f"{len(continuation)} tokens to score, but the model reads {self.max_length} at most")
            groups.setdefault(tuple(context[-room:]), []).append(place)
        answers: dict[int, tuple[float, bool]] = {}
        for contexts in _batches(sorted(groups, key=len, reverse=True), override_bs or self.batch_size):
            ids, mask = _padded([list(context[:-1]) for context in contexts], self.device, left=True)
            with self.manager.attach(self.model) as cache:
                self._read(ids, mask, cache)
                rows = [(row, place) for row, context in enumerate(contexts) for place in groups[context]]
                for some in _batches(rows, override_bs or self.batch_size):
                    part = cache.clone()
                    part.batch_select_indices(torch.tensor([row for row, _ in some]))
                    inputs = [[contexts[row][-1], *requests[place][2][:-1]] for row, place in some]
                    asked, real = _padded(inputs, self.device, left=False)
                    whole = torch.cat((mask[[row for row, _ in some]], real), 1)
                    scores = self._forward(asked, whole, part).float().log_softmax(-1, dtype=self.softmax_dtype)
                    for (_, place), score in zip(some, scores, strict=True):
                        answers[place] = _scored(score, requests[place][2])
        for place, answer in answers.items():
            if requests[place][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return [answers[place] for place in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Return the tokens of context and continuation (batch, tokens)."""
        mask = options["attention_mask"]
        with self.manager.attach(self.model) as cache:
            with torch.no_grad():
                self._read(context[:, :-1], mask[:, :-1], cache)
            cache.batch_repeat_interleave(int(options.get("num_beams", 1)))
            generated: Tensor = super()._model_generate(context, max_length, stop, **passed(cache), **options)
            return generated

    def _read(self, ids: Tensor, mask: Tensor, cache: SlotCache) -> None:
        """Read a context (batch, tokens) and let the manager decide; nothing where there is nothing to read."""
        if ids.shape[1]:
            with cache.reading():
                self._forward(ids, mask, cache, logits_to_keep=1)

    def _forward(self, ids: Tensor, mask: Tensor, cache: SlotCache, **options: Any) -> Tensor:
        """Return the logits of ``ids`` (batch, tokens); the mask covers everything read so far, and them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        precision = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=precision, enabled=precision is not None):
            logits: Tensor = self.model(
                ids, attention_mask=mask, position_ids=positions, use_cache=True, **passed(cache, self.model), **options
            ).logits
        return logits


def _manager(manager: str | MemoryManager, budget: int | float | None, every: int | None) -> MemoryManager:
    """Return the manager that a user named, with budget and schedule as given."""
    if isinstance(manager, str):
        place = user_path(manager)
        manager = load(place if is_folder(place) else manager) if is_folder(place) or "/" in manager else build(manager)
    changes: dict[str, Any] = {"budget": budget} if budget is not None else {}
    if every is not None:
        changes["every"] = every or None
    return manager.with_options(**changes) if changes else manager


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def _padded(rows: list[list[int]], device: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return the rows as ids (rows, longest), padded with 0, and their mask: 1 for what is no padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row, dtype=torch.int64, device=device)
        mask[at, place] = 1
    return ids, mask


def _nothing(what: str, text: object) -> str:
    return (
        f"request {shown(repr(text), 120)}: the {what} has no token for this model's tokenizer, and the likelihood of "
        "nothing would be the best there is; mend the task, or leave this sample out of it"
    )


def _scored(scores: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of the continuation under scores (tokens, vocabulary), and whether it is the greedy one."""
    tokens = torch.tensor(continuation, device=scores.device)
    scores = scores[: len(tokens)]
    return float(scores.gather(1, tokens[:, None]).sum()), bool((scores.argmax(-1) == tokens).all())


if __name__ == "__main__":
    try:
        cli_evaluate()
    except EvomemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
