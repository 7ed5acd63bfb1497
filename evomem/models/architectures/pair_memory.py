"""Model: a memory by itself, which reads a stream of requests: nothing about it is trained, only what it keeps matters.

It is loaded by a name, has a digest, is sent to workers and compared like every model, and what it reads through is a
cache whose layers are memories: so every manager, driver and plug-in works on it. It reads requests
(`evomem.tasks.streams`), no tokens of a text, and answers nothing by itself: see `evomem.evaluation.streams`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from evomem.errors import ModelError
from evomem.memory.explicit import ExplicitCache, PairMemory
from evomem.memory.kv.policy import CachePolicy
from evomem.models.architectures.word_tokenizer import word_tokenizer


class PairMemoryConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration.

    Attributes
    ----------
    num_hidden_layers : memories one behind the other: one.
    num_attention_heads : sets that names are divided over, as in a set-associative cache: name n goes to set n modulo
        their number. Each has slots of its own, and an allocation shares the budget out over them.
    beta : β of a read by softmax; None: reads are exact, by name.
    """

    model_type = "evomem_pair_memory"

    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    hidden_size: int = 1
    vocab_size: int = 2
    beta: float | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class PairMemoryModel(PreTrainedModel, GenerationMixin):
    """A pair memory that reads streams of requests.

    Attributes
    ----------
    reads_streams : says so to evaluations.
    place : (1,), a parameter that says where the memory lies and of which type it is; its number is never read.
    """

    config_class = PairMemoryConfig
    config: PairMemoryConfig
    base_model_prefix = "memory"
    main_input_name = "input_ids"
    reads_streams = True

    def __init__(self, config: PairMemoryConfig) -> None:
        super().__init__(config)
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.post_init()  # type: ignore[no-untyped-call]

    def decided_cache(self, policy: CachePolicy) -> ExplicitCache:
        """Return an empty memory about which a manager decides.

        Raises
        ------
        ConfigError : it observes something that means nothing here.
        """
        layer = PairMemory(observes=policy.observes, beta=self.config.beta)
        return ExplicitCache([layer], policy)

    def sets(self, names: Tensor) -> Tensor:
        """Return which requests go to which set: names (requests,) int64 -> (sets, requests) bool."""
        sets = torch.arange(self.config.num_attention_heads, device=names.device)
        return names % len(sets) == sets[:, None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse; raises `ModelError`."""
        raise ModelError(
            "a pair memory reads streams of requests (evomem list tasks: zipf and others), no text; measure it with "
            "evomem compare or evolve on such a task"
        )


def pair_memory_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows no word: requests are counted, and nothing of them is looked up."""
    return word_tokenizer({"<pad>": 0, "<unk>": 1})


AutoConfig.register(PairMemoryConfig.model_type, PairMemoryConfig, exist_ok=True)
AutoModelForCausalLM.register(PairMemoryConfig, PairMemoryModel, exist_ok=True)
