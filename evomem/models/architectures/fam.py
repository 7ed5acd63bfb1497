"""Model: TransformerFAM, a transformer that reads in blocks and feeds a summary of each back to its own layers.

Hwang et al. 2024 (arXiv 2404.09173), Algorithm 2. A token attends to the block that it stands in, causally, to the
``segments`` blocks before it, and to the feedback F of its layer. When a block ends, the same layer makes a new F: its
queries are F, its keys and values the block and F, and what they read goes through the layer's feed-forward part. So F
has all blocks behind it, at constant memory, and the layers have no new weights: F begins as learned embeddings.

The source leaves open, and this model chooses: what F is in a layer before the first block is what the layers below
made of the embeddings alone, so it depends on no token and is the same for all rows; F stands at the last positions of
the block that it has compressed, as keys and, a block later, as queries; positions are rotary, so that only distances
matter, and training needs no random offset; F is held in fp32.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from evomem.errors import ConfigError
from evomem.memory.explicit.feedback import FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots
from evomem.models.architectures.calls import LOSS_TYPE
from evomem.models.architectures.checks import SIZES, require_counts, require_rotary_heads
from evomem.models.architectures.fam_layers import FamBlock, Turn
from evomem.models.architectures.fam_reading import FeedbackModel


class FamConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : as in other decoders.
    block : tokens of a block.
    segments : m, blocks before a token's own that it attends to.
    feedback : FL, slots of the feedback memory. 0: none, block sliding-window attention alone.
    """

    model_type = "evomem_fam"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    block: int = 16
    segments: int = 1
    feedback: int = 4
    initializer_range: float = 0.05
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        require_counts("feedback memory", self, SIZES)
        if self.block < 1 or self.segments < 0 or self.feedback < 0:
            raise ConfigError(
                f"feedback memory: block {self.block}, segments {self.segments}, feedback {self.feedback}; a block has "
                "1 token or more, and the others are counts of 0 or more"
            )
        require_rotary_heads("feedback memory", self)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class Fam(FeedbackModel):
    """A small causal language model with feedback memory in every layer; see the module.

    Attributes
    ----------
    summary : (slots, hidden_size), the embeddings that feedback begins as; None without feedback.
    """

    config_class = FamConfig
    config: FamConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: FamConfig) -> None:
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.summary = nn.Embedding(config.feedback, config.hidden_size) if config.feedback else None
        self.blocks = nn.ModuleList(FamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a new model begins with."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that gives logits."""
        head: nn.Module = self.lm_head
        return head

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Return what the first layer is given of tokens: (batch, tokens, hidden_size)."""
        embedded: Tensor = self.embed(input_ids)
        return embedded

    def initial_feedback(self, embeddings: Tensor | None = None) -> list[Tensor | None]:
        """Return F before the first block, of every layer; see `FeedbackModel.initial_feedback`."""
        if self.summary is None:
            return [None] * len(self.blocks)
        feedback = self.summary.weight[None] if embeddings is None else embeddings
        initial = list[Tensor | None]()
        for block in self.blocks:
            initial.append(feedback[0] if embeddings is None else feedback)
            feedback = cast(FamBlock, block).carry(feedback)
        return initial

    def read(
        self,
        embedded: Tensor,
        turn: Turn,
        layers: Sequence[FeedbackLayer | FeedbackSlots],
        inputs: Sequence[list[Tensor]] | None,
    ) -> Tensor:
        """Return what the last layer makes of a turn's tokens; see `FeedbackModel.read`."""
        hidden = embedded
        for index, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            if inputs is not None:
                inputs[index].append(hidden)
            hidden = block(hidden, turn, layer)
        return hidden


AutoConfig.register(FamConfig.model_type, FamConfig, exist_ok=True)
AutoModelForCausalLM.register(FamConfig, Fam, exist_ok=True)
