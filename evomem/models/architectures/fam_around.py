"""Model: feedback memory around a frozen decoder of transformers (TransformerFAM, arXiv 2404.09173, section 3).

The decoder reads block by block. Every layer is given, beside a block's tokens, the feedback F that it made at the
last block's end, twice: in front, as keys that tokens attend to, and behind, as queries that attend to the block and to
F. What the layer makes of the queries is its next F. No layer has new weights: the embeddings that F begins as are the
only numbers that are learned.

What the source leaves open is decided as in `evomem.models.architectures.fam`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from evomem.errors import ConfigError, ModelError
from evomem.memory.explicit.feedback import FeedbackLayer
from evomem.memory.explicit.feedback_slots import FeedbackSlots, FeedbackSlotsCache
from evomem.memory.kv.policy import CachePolicy
from evomem.memory.observations.base import Observation
from evomem.memory.observations.updates import CHANGES, UPDATES
from evomem.models.architectures.calls import LOSS_TYPE
from evomem.models.architectures.decoder_check import require_additive
from evomem.models.architectures.fam_layers import Turn
from evomem.models.architectures.fam_passes import AlonePass, ReadingPass
from evomem.models.architectures.fam_reading import FeedbackModel
from evomem.models.architectures.frozen_decoder import FrozenDecoder, require_field

MOST = 1 << 20
"""Bound on every size."""


class FamAroundConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    inside : what the decoder is: its class and sizes.
    hidden_size, num_hidden_layers, vocab_size : the decoder's.
    block, segments, feedback : as of `FamConfig`.
    """

    model_type = "evomem_fam_around"

    inside: str = ""
    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    block: int = 16
    segments: int = 1
    feedback: int = 4
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        least = {"block": 1, "segments": 0, "feedback": 0}
        for name, count in least.items():
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or not count <= number <= MOST:
                raise ConfigError(
                    f"feedback memory: {name} is {number!r}; give a whole number from {count} to {MOST:,}"
                )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


class FamAround(FeedbackModel):
    """A frozen decoder with feedback memory in every layer; see the module.

    Its parameters, and what `state_dict` saves, are the embeddings alone. The decoder is used as it is when the model
    is made: weights are shared, the decoder's own attention goes on as before.

    Parameters
    ----------
    decoder : a causal language model of transformers with rotary positions.
    block, segments, feedback : as of `FamConfig`; feedback 0 is block sliding-window attention alone.

    Attributes
    ----------
    summary : (slots, hidden_size), drawn with the mean and deviation of the decoder's token embeddings.

    Raises
    ------
    ConfigError : sizes that no blocks have.
    UnsupportedModelError : the decoder is of a kind that cannot be read so; see `FrozenDecoder`. A few passes over
        three tokens check that its layers add what attention reads to what they were given, and that nothing is lost.
    """

    config_class = FamAroundConfig
    config: FamAroundConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, decoder: PreTrainedModel, block: int = 16, segments: int = 1, feedback: int = 4) -> None:
        if not isinstance(decoder, PreTrainedModel):
            raise ModelError(
                f"feedback memory goes around a decoder, and was given a {type(decoder).__name__}; load the decoder, "
                "give it to FamAround(decoder, ...), and its embeddings to load_state_dict"
            )
        frozen, text = FrozenDecoder(decoder), decoder.config.get_text_config(decoder=True)
        weight: Any = decoder.get_input_embeddings().weight
        width = int(weight.shape[1])
        config = FamAroundConfig(
            inside=f"{type(decoder).__name__} of {frozen.depth} layers of {width}",
            vocab_size=text.vocab_size, hidden_size=width, num_hidden_layers=frozen.depth,
            block=block, segments=segments, feedback=feedback,
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
        )  # fmt: skip
        require_field(decoder, (segments + 1) * block)
        super().__init__(config)
        self.loss_type = LOSS_TYPE
        self._decoder = frozen
        self.norm = nn.Identity()  # the decoder's own is part of its pass
        self.summary = None
        if feedback:
            tokens: Tensor = weight.detach().float()
            drawn = torch.randn(feedback, width, dtype=torch.float32) * float(tokens.std()) + tokens.mean(0).cpu()
            self.summary = nn.Embedding(feedback, width, _weight=drawn.to(tokens.device))
        self.generation_config = copy.deepcopy(decoder.generation_config)
        require_additive(frozen)

    @property
    def lm_head(self) -> nn.Module:
        """The decoder's layer that gives logits."""
        return self._decoder.head

    @property
    def device(self) -> torch.device:
        """The decoder's device."""
        device: torch.device = self._decoder.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's token embeddings; feedback itself is held in fp32."""
        return self._decoder.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FamAround:
        self._decoder.model._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's embedding of tokens."""
        embedding: nn.Module = self._decoder.model.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's layer that gives logits."""
        return self._decoder.head

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> FamAround:
        """Refuse; raises `ModelError`: a folder has no decoder."""
        raise ModelError(
            "feedback memory around a decoder has no folder of its own: load the decoder, then "
            "FamAround(decoder, ...).load_state_dict(...) with the saved embeddings"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse; raises `ModelError`: the decoder is not this model's to save."""
        raise ModelError(
            "feedback memory around a decoder is not saved with the decoder: save its embeddings, "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        )

    def decided_cache(self, policy: CachePolicy) -> FeedbackSlotsCache:
        """Return an empty memory about which a manager decides; see `FeedbackModel.decided_cache`.

        Raises
        ------
        ConfigError : see there; or the manager observes who reads the slots, which the decoder does not say.
        """
        cache = super().decided_cache(policy)
        unknown = [one.spec for one in cache.wanted.observations if not _says_update(one)]
        if unknown:
            raise ConfigError(
                f"the manager observes {', '.join(sorted(unknown))}, and a frozen decoder's attention does not say who "
                "reads its feedback; take one that observes change, agreement or updates (write_gate), or nothing"
            )
        return cache

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Return the decoder's embeddings of tokens: (batch, tokens, hidden_size)."""
        return self._decoder.embedded(input_ids)

    def initial_feedback(self, embeddings: Tensor | None = None) -> list[Tensor | None]:
        """Return what the decoder's layers make of the embeddings alone; see `FeedbackModel.initial_feedback`."""
        if self.summary is None:
            return [None] * self.depth
        given = self.summary.weight[None] if embeddings is None else embeddings
        given = given.to(self._decoder.dtype)
        alone = AlonePass(given)
        self._decoder.run(given, torch.arange(given.shape[1], device=given.device)[None], alone)
        return [one[0] if embeddings is None else one for one in alone.inputs]

    def read(
        self,
        embedded: Tensor,
        turn: Turn,
        layers: Sequence[FeedbackLayer | FeedbackSlots],
        inputs: Sequence[list[Tensor]] | None,
    ) -> Tensor:
        """Return what the decoder makes of a turn's tokens, its last norm included; see `FeedbackModel.read`."""
        reading = ReadingPass(embedded, turn, layers, inputs, self.config)
        hidden = self._decoder.run(reading.embedded, reading.positions, reading)
        return hidden[:, reading.tokens]


def _says_update(observation: Observation) -> bool:
    """Whether an observation is about updates alone."""
    return bool({UPDATES, CHANGES} & observation.needs)
