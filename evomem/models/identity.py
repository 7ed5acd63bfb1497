"""Model: what a model in memory is recognised by, wherever it was loaded from."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOLATILE = frozenset(
    {"architectures", "dtype", "gradient_checkpointing", "output_attentions", "output_hidden_states", "return_dict",
     "torch_dtype", "transformers_version", "use_cache"}
)  # fmt: skip
"""Fields of a configuration that say nothing about what a model computes."""
PARAMETERS, SAMPLE = 256, 64
"""Parameters, and numbers of each, that a model is recognised by: all of them would take as long as reading them."""


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """Return ``class``, digest of the decoder's ``config``, ``dtype``, and digests of some ``weights`` by name.

    Weights that are not in memory (offloaded to disk) are left out.
    """
    text: Any = model.config.get_text_config(decoder=True)
    said = {n: v for n, v in text.to_dict().items() if n not in _VOLATILE and not n.startswith("_")}
    config = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "class": type(model).__name__,
        "config": config,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights(model),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the hash of what a tokenizer makes of texts: its vocabulary, merges and rules, or the vocabulary alone.

    Padding and truncation are left out, because calls change them.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    said: Any = type(tokenizer).__name__
    if fast is not None:
        said = {key: part for key, part in json.loads(fast.to_str()).items() if key not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        said = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _weights(model: PreTrainedModel) -> dict[str, str]:
    named = list(model.named_parameters())
    chosen = [named[at * len(named) // PARAMETERS] for at in range(PARAMETERS)] if len(named) > PARAMETERS else named
    digests = {}
    for name, parameter in chosen:
        if parameter.is_meta or not parameter.numel():
            continue
        with suppress(RuntimeError, NotImplementedError, TypeError):  # kinds of tensors that cannot be looked into
            flat = parameter.detach().reshape(-1)
            places = [at * (flat.numel() - 1) // (SAMPLE - 1) for at in range(SAMPLE)]
            sample = flat[torch.tensor(places, device=flat.device)].cpu().contiguous().view(torch.uint8)
            content = sample.numpy().tobytes() + str(tuple(parameter.shape)).encode()
            digests[name] = hashlib.sha256(content).hexdigest()[:16]
    return digests
