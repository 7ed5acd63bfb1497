"""Testing: which decoders of the installed transformers conform, tried one by one on tiny random models.

``python -m evomem.testing.families`` tries every model type that transformers has a causal language model for: a
narrow copy of the default configuration (`evomem.memory.kv.narrow`) with random weights and windows of 6 tokens reads
45
tokens, padded and unpadded, in fp32 and in bf16, under managers that evict and the conformance kit. It writes a table,
``docs/families.md``. A process of its own tries the families, and is replaced when one crashes it or hangs.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from evomem.errors import EvomemError, UnsupportedModelError
from evomem.managers import build
from evomem.memory import check_supported
from evomem.memory.kv.narrow import narrow, random_model
from evomem.memory.kv.self_check import SelfCheckWarning, self_check
from evomem.testing.conformance import CHECKS, run_check

Status = Literal["conforms", "refused", "differs", "not tried"]
PLANS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("h2o(budget=14, every=16)", tuple(check for check in CHECKS if check != "beams")),
    ("adakv(snapkv(window=8), budget=10)", ("evicted_is_hidden", "row_alone", "evicted_values")),
)
"""Managers, and the checks of the kit that each goes through."""
TYPES = (torch.float32, torch.bfloat16)
SECONDS = 300.0
"""A family that takes longer hangs."""
EXPERTS = 4

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": "auto"},
    "glm4_moe": {"head_dim": 64, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.125},  # by default 1, under which random queries look at one key each
    "granitemoe": {"attention_multiplier": 0.125},
    "granitemoehybrid": {"mamba_d_head": "auto"},
    "granitemoeshared": {"attention_multiplier": 0.125},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "d_model": 64, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}, "n_layers": 2, "max_seq_len": 128,
        "num_key_value_heads": 2,
    },
    "dots1": {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 64,
    },
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32, "num_experts": EXPERTS, "moe_topk": 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 32},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What default configurations leave open, or say at odds with themselves."""


FP32_ONLY = {"phimoe": "in fp32; in bf16 its router, which gives the two experts different parts, flips by rounding"}
"""Families that cannot be compared in bf16, with the reason."""


@dataclass(frozen=True)
class Verdict:
    """What became of a family: its model type and class, whether it conforms, and why not."""

    type: str
    family: str
    status: Status
    why: str = ""


def model_types() -> list[str]:
    """Model types of transformers that have a causal language model, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small(model_type: str, *, fewer_heads: bool = True) -> Any:
    """Return a narrow configuration of a model type, in which nothing ends a generation early."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    changes = dict(CHANGES.get(model_type, {}))
    if "is_decoder" in config.to_dict():
        changes["is_decoder"] = True
    config = narrow(config, every_expert=True, fewer_heads=fewer_heads, **changes)
    for part in (config, config.get_text_config(decoder=True)):
        part.eos_token_id, part.pad_token_id, part.bos_token_id = None, 0, 1
    return config


def try_family(model_type: str) -> Verdict:
    """Build a tiny random model of a family, attach to it, and run the conformance kit on it."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    make: Any = AutoModelForCausalLM
    family = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    try:
        config = small(model_type)
        family = _look(make, config)
        model = random_model(make.from_config, config)
    except UnsupportedModelError as error:
        return Verdict(model_type, family, "refused", _reason(error, family))
    except Exception as error:  # whatever transformers' classes raise
        try:
            _look(make, small(model_type, fewer_heads=False))
        except UnsupportedModelError as refusal:
            return Verdict(model_type, family, "refused", _reason(refusal, family))
        except Exception:
            pass
        return Verdict(model_type, family, "not tried", f"no small copy: {_line(error)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SelfCheckWarning)
            self_check(model)
    except UnsupportedModelError as error:
        return Verdict(model_type, family, "refused", _reason(error, family))
    except SelfCheckWarning as warning:
        return Verdict(model_type, family, "not tried", _line(warning))
    try:
        _run(model, TYPES[:1] if model_type in FP32_ONLY else TYPES)
    except EvomemError as error:
        return Verdict(model_type, family, "differs", _line(error))
    except Exception as error:
        return Verdict(model_type, family, "differs", f"the kit fails: {_line(error)}")
    return Verdict(model_type, family, "conforms", FP32_ONLY.get(model_type, ""))


def _look(make: Any, config: Any) -> str:
    """Return the class that a configuration is for; raise `UnsupportedModelError` where it is refused unseen."""
    with torch.device("meta"):
        drawn = make.from_config(config)
    check_supported(drawn)
    return type(drawn).__name__


def _run(model: Any, types: Sequence[torch.dtype]) -> None:
    """Run the kit in every type; the error names manager, check and type."""
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    for dtype in types:
        model.to(dtype)
        for spec, checks in PLANS:
            for check in checks:
                try:
                    run_check(check, build(spec), model)
                except Exception as error:
                    where = f"{str(dtype).removeprefix('torch.')}, {spec}, {check}"
                    raise UnsupportedModelError(f"{where}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:240] if isinstance(error, (EvomemError, Warning)) else f"{type(error).__name__}: {text[:200]}"


def _reason(error: UnsupportedModelError, family: str) -> str:
    """The message without what every refusal says."""
    text = str(error).removeprefix(f"{family} ")
    return " ".join(text.split(" evomem needs ")[0].split("; it needs ")[0].rstrip(";").split())


# ---- a process that may crash or hang -------------------------------------------------------------------------------


class _Worker:
    """A process that tries families one by one, as they are asked for."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "evomem.testing.families", "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def ask(self, model_type: str, seconds: float) -> Verdict | str:
        """Return what became of a family, or why nothing did; the worker is of no use then."""
        try:
            if self._process.stdin is None:
                return "no way to ask"
            self._process.stdin.write(model_type + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return f"it took more than {seconds:.0f} s"
        except BrokenPipeError:
            line = ""
        if not line:
            return f"its process ended with exit code {self._process.wait()}"
        return Verdict(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def verdicts(types: Sequence[str], seconds: float = SECONDS) -> Iterator[Verdict]:
    """Try families in a process of their own, which is replaced when it ends or hangs."""
    worker: _Worker | None = None
    try:
        for model_type in types:
            worker = worker or _Worker()
            answer = worker.ask(model_type, seconds)
            if isinstance(answer, Verdict):
                yield answer
                continue
            worker.close()
            worker = None
            yield Verdict(model_type, "", "not tried", answer)
    finally:
        if worker is not None:
            worker.close()


def _work(questions: TextIO, answers: TextIO) -> None:
    from transformers import logging

    quiet: Any = logging.set_verbosity_error
    quiet()
    torch.set_num_threads(1)
    for line in questions:
        print(json.dumps(asdict(try_family(line.strip()))), file=answers, flush=True)


# ---- the page -------------------------------------------------------------------------------------------------------


_EXPLANATION = """\
`python -m evomem.testing.families` makes this page (`make test-families`). Every model type that transformers has a
causal language model for is built small and at random from its default configuration: two layers of each kind, two KV
heads, windows and chunks of 6 tokens, every token to both of two experts (a choice of experts flips by rounding). It
conforms when the conformance kit passes in fp32 and in bf16 with `h2o(budget=14, every=16)` and
`adakv(snapkv(window=8), budget=10)` on 45 tokens, padded and unpadded: with nothing evicted it is the stock model, and
with eviction it is the stock model under the mask that hides the evicted tokens.

Another configuration of the same family may be refused: the first `attach` of a model that evomem's tests do not cover
[checks it](integrations.md#models-that-evomem-does-not-know).
"""


def page(tried: Sequence[Verdict], version: str) -> str:
    """Return the table as a page."""
    count = Counter(verdict.status for verdict in tried)
    summary = (
        f"**{count['conforms']} of the {len(tried)} decoders of transformers {version} conform**; {count['refused']} "
        f"are refused when they are attached; {count['not tried']} were not tried"
    )
    summary += f"; {count['differs']} are accepted and fail the kit." if count["differs"] else "."
    rows = [
        f"| `{v.type}` | {v.family} | {v.status} | {v.why.replace('|', '/')} |".replace("|  |", "| |") for v in tried
    ]
    table = ["| model type | class | | why |", "|---|---|---|---|", *rows]
    return "\n".join(["# Model families", "", summary, "", _EXPLANATION, *table]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try families and write the page; return 1 if one is accepted and fails the kit."""
    import transformers

    parser = argparse.ArgumentParser(
        prog="python -m evomem.testing.families",
        description="Try every decoder of the installed transformers, and write a table of what conforms.",
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types to try, for example llama; default: all")
    parser.add_argument("--out", type=Path, help="page to write; default: docs/families.md when all are tried")
    parser.add_argument("--timeout", type=float, default=SECONDS, metavar="SECONDS", help="longest time for a family")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work(sys.stdin, sys.stdout)
        return 0
    known = model_types()
    if unknown := sorted(set(options.types) - set(known)):
        parser.error(f"transformers {transformers.__version__} has no decoder of type {', '.join(unknown)}")
    types = options.types or known
    out = options.out or (None if options.types else Path("docs/families.md"))
    tried, begin = [], time.monotonic()
    for verdict in verdicts(types, options.timeout):
        tried.append(verdict)
        seconds = time.monotonic() - begin
        print(f"{len(tried)}/{len(types)} {seconds:.0f}s {verdict.type}: {verdict.status} {verdict.why}", flush=True)
    if out is not None:
        out.write_text(page(tried, transformers.__version__), encoding="utf-8")
        print(f"wrote {out}")
    return int(any(verdict.status == "differs" for verdict in tried))


if __name__ == "__main__":
    sys.exit(main())
