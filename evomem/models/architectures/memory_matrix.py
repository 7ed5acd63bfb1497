"""Model: a transformer whose attention sees a short window and a memory matrix; all that is older goes through it.

Each layer has a matrix M (batch, matrix_heads, slots, width). A token reads c = Σ_i softmax(M k_r)_i M_i, attends with
Q' = Q + 1 cᵀ W_c over K' = [K; M W_K] and V' = [V; M W_V], where K and V are those of the window's tokens, and
then writes (`evomem.memory.explicit.matrix_rules`). It sees M as the tokens before it left it.

The source leaves open, and this model chooses: rotary positions inside the window and none on the rows of M; keys and
values of M are made of the last ``reach`` inputs besides the token's own, so that one write can join a key and the
value after it; a gate σ(g) that stores more or less of a write; the rows that M begins with are learned.

Importing this module makes its classes known to transformers' Auto classes; `evomem.models.load` does so for a folder
whose ``config.json`` has this ``model_type``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from evomem.errors import ConfigError, ModelError
from evomem.memory.explicit.matrix import Exchange, MatrixCache, MatrixLayer
from evomem.memory.explicit.matrix_rules import Write, check_rule, precise


class MemoryMatrixConfig(PreTrainedConfig):
    """Configuration.

    Attributes
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : as in other decoders.
    window : tokens that attention sees, the token itself included.
    matrix_slots, matrix_width, matrix_heads : N and D of M, and how many of them a layer has; attention heads share
        them evenly. 0 slots: no memory, attention sees the window only.
    rule : how M is written: ``leaky``, ``ema``, ``erase_add`` or ``gated``.
    decay : λ that a slot begins with, in (0, 1].
    decay_per_slot : λ is learned, one for every slot.
    matrix_layers : the layers that have a memory; None: all.
    reach : inputs before the token's own of which keys and values of M are made.
    """

    model_type = "evomem_memory_matrix"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    window: int = 16
    matrix_slots: int = 32
    matrix_width: int = 64
    matrix_heads: int = 1
    matrix_layers: list[int] | None = None
    rule: str = "erase_add"
    decay: float = 1.0
    decay_per_slot: bool = False
    reach: int = 1
    initializer_range: float = 0.05
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_rule(self.rule)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "window", "matrix_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory matrix: {name} is {getattr(self, name)}; give at least 1")
        if self.matrix_slots < 0 or self.reach < 0:
            raise ConfigError("memory matrix: matrix_slots and reach are counts; give 0 or more")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"memory matrix: hidden_size {self.hidden_size} does not give {self.num_attention_heads} attention "
                "heads an even size each, which rotary positions need"
            )
        if self.matrix_heads < 1 or self.num_attention_heads % self.matrix_heads:
            raise ConfigError(
                f"memory matrix: {self.num_attention_heads} attention heads cannot share {self.matrix_heads} matrices "
                "evenly"
            )
        if not set(self.memory_layers) <= set(range(self.num_hidden_layers)):
            raise ConfigError(
                f"memory matrix: matrix_layers is {self.matrix_layers}; give numbers of layers, from 0 to "
                f"{self.num_hidden_layers - 1}"
            )
        if not 0 < self.decay <= 1 or (self.decay_per_slot and self.decay == 1):
            raise ConfigError(
                f"memory matrix: decay is {self.decay}; give a number in (0, 1], below 1 where every slot learns its "
                "own"
            )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def memory_layers(self) -> list[int]:
        """The layers that have a memory."""
        layers = list(range(self.num_hidden_layers)) if self.matrix_layers is None else self.matrix_layers
        return layers if self.matrix_slots else []


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return x (..., heads * size) as (..., heads, size)."""
    return x.view(*x.shape[:-1], heads, -1)


class RowMemory(nn.Module):
    """The memory of one layer: what tokens write into M and read from it."""

    def __init__(self, config: MemoryMatrixConfig) -> None:
        super().__init__()
        self.rule, self.reach = config.rule, config.reach
        heads, slots, width = config.matrix_heads, config.matrix_slots, config.matrix_width
        inputs = config.hidden_size * (1 + config.reach)
        self.heads = heads
        self.initial = nn.Parameter(torch.zeros(heads, slots, width))
        self.write_key = nn.Linear(inputs, heads * width)
        self.write_value = nn.Linear(inputs, heads * width)
        self.read_key = nn.Linear(inputs, heads * width)
        self.store = nn.Linear(inputs, heads)
        if config.rule == "erase_add":
            self.erase = nn.Linear(inputs, heads * width)
        if config.rule == "gated":
            self.input_bias = nn.Linear(inputs, heads)
            self.forget_key = nn.Linear(inputs, heads * width)
            self.forget_bias = nn.Linear(inputs, heads)
        self.decay = config.decay
        if config.decay_per_slot:
            self.decay_logit = nn.Parameter(torch.full((heads, slots), math.log(config.decay / (1 - config.decay))))

    def decays(self) -> Tensor | None:
        """λ, () or (matrix_heads, slots) fp32; None: 1."""
        if hasattr(self, "decay_logit"):
            return torch.sigmoid(precise(self.decay_logit))
        return None if self.decay == 1 else precise(self.initial).new_full((), self.decay)

    def _split(self, part: Tensor) -> Tensor:
        """(batch, tokens, heads * width) as (batch, heads, tokens, width), in fp32."""
        return precise(split_heads(part, self.heads).transpose(1, 2))

    def writes(self, inputs: Tensor) -> Write:
        """Return what tokens write, of their inputs (batch, tokens, hidden * (1 + reach)), the newest first."""

        def gate(layer: nn.Linear) -> Tensor:
            values: Tensor = layer(inputs)
            return precise(values.transpose(1, 2))

        write = {"key": self._split(self.write_key(inputs)), "value": self._split(self.write_value(inputs))}
        write["store"] = torch.sigmoid(gate(self.store))
        if self.rule == "erase_add":
            write["erase"] = torch.sigmoid(self._split(self.erase(inputs)))
        if self.rule == "gated":
            write["input_bias"], write["forget_bias"] = gate(self.input_bias), gate(self.forget_bias)
            write["forget_key"] = self._split(self.forget_key(inputs))
        return Write(**write)

    def forward(self, hidden: Tensor, real: Tensor | None, layer: MatrixLayer) -> Exchange:
        """Let a chunk (batch, tokens, hidden) read and write, and note it in ``layer``.

        real : (batch, tokens) bool, no padding; None: there is none.
        """
        batch, tokens, width = hidden.shape
        hidden = hidden if real is None else hidden * real[..., None]
        tail = hidden.new_zeros(batch, self.reach, width) if layer.tail is None else layer.tail
        line = torch.cat((tail, hidden), 1)
        inputs = torch.cat(
            [line[:, self.reach - back : self.reach - back + tokens] for back in range(1 + self.reach)], -1
        )
        layer.tail = line[:, tokens:]
        keys = self._split(self.read_key(inputs))
        return layer.exchange(self.writes(inputs), keys, self.rule, self.decays(), precise(self.initial), real)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Return x (batch, heads, tokens, head_dim) rotated to positions (batch or 1, tokens), as Su et al. 2021 do."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * rates
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class WindowAttention(nn.Module):
    """Attention over the window's tokens and the rows of M."""

    def __init__(self, config: MemoryMatrixConfig, index: int) -> None:
        super().__init__()
        self.heads, self.window = config.num_attention_heads, config.window
        self.size = config.hidden_size // config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.memory = RowMemory(config) if index in config.memory_layers else None
        if self.memory is not None:
            shape = (config.matrix_heads, self.heads // config.matrix_heads, config.matrix_width, self.size)
            self.context_query, self.row_key, self.row_value = (nn.Parameter(torch.zeros(shape)) for _ in range(3))

    def forward(self, hidden: Tensor, positions: Tensor, real: Tensor | None, layer: MatrixLayer) -> Tensor:
        """Return (batch, tokens, hidden), and note the chunk in ``layer``."""
        tokens = hidden.shape[1]

        def split(part: Tensor) -> Tensor:
            return split_heads(part, self.heads).transpose(1, 2)

        query, key, value = (split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        scores: list[Tensor] = []
        seen: Exchange | None = None
        if self.memory is not None:
            seen = self.memory(hidden, real, layer)
            groups = precise(query.view(len(query), seen.rows.shape[1], -1, *query.shape[2:]))
            # (batch, matrix heads, heads of each, tokens, head_dim)
            groups = groups + torch.einsum("bgte,ghed->bghtd", seen.context, precise(self.context_query))
            query = groups.flatten(1, 2).to(query.dtype)
            # q · (M W_K) is (q W_Kᵀ) · M: the rows' keys and values are never written out for every token.
            turned = torch.einsum("bghtd,ghed->bghte", groups, precise(self.row_key))
            logits = torch.einsum("bghte,bgtne->bghtn", turned, seen.rows) / math.sqrt(self.size)
            logits = logits if seen.bias is None else logits + seen.bias[:, :, None]
            scores.append(logits.flatten(1, 2))
        key = rotate(key, positions)
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
        if layer.window_keys is not None and layer.window_values is not None and layer.window_real is not None:
            key, value = torch.cat((layer.window_keys, key), 2), torch.cat((layer.window_values, value), 2)
            real = torch.cat((layer.window_real, real), 1)
        past = key.shape[2] - tokens
        behind = torch.arange(past, past + tokens, device=hidden.device)[:, None] - torch.arange(
            past + tokens, device=hidden.device
        )
        near = (behind >= 0) & (behind < self.window)
        visible = near & (
            real[:, None, None] | (behind == 0)
        )  # padding sees itself, so that nothing is divided by zero
        window = precise(rotate(query, positions) @ key.transpose(-1, -2)) / math.sqrt(self.size)
        scores.append(window.masked_fill(~visible, -torch.inf))
        weights = torch.softmax(torch.cat(scores, -1), -1)
        output = weights[..., weights.shape[-1] - key.shape[2] :] @ precise(value)
        if seen is not None:
            shares = weights[..., : seen.rows.shape[3]].view(len(query), seen.rows.shape[1], -1, *scores[0].shape[2:])
            mixed = torch.einsum("bghtn,bgtne->bghte", shares, seen.rows)
            output = output + torch.einsum("bghte,ghed->bghtd", mixed, precise(self.row_value)).flatten(1, 2)
        kept = min(self.window - 1, key.shape[2])
        layer.window_keys, layer.window_values, layer.window_real = (
            part.narrow(axis, part.shape[axis] - kept, kept) for part, axis in ((key, 2), (value, 2), (real, 1))
        )
        layer.is_initialized, layer.seen = True, layer.seen + tokens
        projected: Tensor = self.o_proj(output.to(hidden.dtype).transpose(1, 2).flatten(-2))
        return projected


class MatrixBlock(nn.Module):
    """A layer: attention over window and matrix, then a feed-forward part, each beside a residual path."""

    def __init__(self, config: MemoryMatrixConfig, index: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.attention = WindowAttention(config, index)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor, positions: Tensor, real: Tensor | None, layer: MatrixLayer) -> Tensor:
        """Return (batch, tokens, hidden)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), positions, real, layer)
        added: Tensor = self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + added


class MemoryMatrix(PreTrainedModel, GenerationMixin):
    """A small causal language model with a memory matrix in every layer; see the module."""

    config_class = MemoryMatrixConfig
    config: MemoryMatrixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: MemoryMatrixConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MatrixBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a new model begins with."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RowMemory):
            nn.init.normal_(module.initial)  # rows that were equal would stay equal
            if self.config.decay_per_slot:
                nn.init.constant_(module.decay_logit, math.log(self.config.decay / (1 - self.config.decay)))
        elif isinstance(module, WindowAttention) and module.memory is not None:
            for part in (module.context_query, module.row_key, module.row_value):
                nn.init.normal_(part, std=deviation)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own cache

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that gives logits."""
        head: nn.Module = self.lm_head
        return head

    def new_cache(self) -> MatrixCache:
        """Return an empty memory for further sequences."""
        return MatrixCache(len(self.blocks))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MatrixCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, kept tokens, vocab_size), and the memory after the tokens.

        Parameters
        ----------
        input_ids : (batch, tokens) int64.
        attention_mask : (batch, tokens ever read), 0 = padding; None: there is none. Padding is neither seen nor
            written.
        position_ids : ignored but for differences between them; by default after what the memory has read.
        past_key_values : of `new_cache`, or None: the memory begins empty.
        logits_to_keep : how many of the last tokens have logits (0: all), or the indices of those that have.

        Raises
        ------
        ModelError : another kind of cache, or a mask that is not (batch, tokens).
        CacheError : an earlier pass over the cache was cut short.
        """
        if past_key_values is not None and not isinstance(past_key_values, MatrixCache):
            raise ModelError(
                f"a memory matrix was given a {type(past_key_values).__name__}; give it model.new_cache(), or none"
            )
        cache = self.new_cache() if past_key_values is None else past_key_values
        cache.require_whole()
        seen, tokens = cache.get_seq_length(), input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=input_ids.device)[None]
        real = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
                raise ModelError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; a memory matrix takes (batch, tokens), 0 "
                    "= padding: who is seen follows from its window"
                )
            real = attention_mask[:, -tokens:].bool()
        hidden: Tensor = self.embed(input_ids)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            hidden = block(hidden, position_ids, real, layer)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.norm(hidden[:, kept]))
        keeps = past_key_values is not None or (not self.training if use_cache is None else use_cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if keeps else None)


AutoConfig.register(MemoryMatrixConfig.model_type, MemoryMatrixConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryMatrixConfig, MemoryMatrix, exist_ok=True)
