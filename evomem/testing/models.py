"""Testing: tiny random models of every managed family, for tests that need the real code and no download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from evomem.errors import UnknownNameError

VOCABULARY = 128
POSITIONS = 2048

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": None,  # nothing ends a generation early
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Weights this large give query-key products a deviation of about 2.5 after scaling by sqrt(head size), so that
    # attention prefers some tokens clearly and an evicted one is missed. The default of 0.02 makes it uniform.
    "initializer_range": 0.2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "gemma": (GemmaConfig, {**_GROUPED, "head_dim": 16}),
    "gpt_neox": (
        GPTNeoXConfig,
        {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
    "gpt2": (GPT2Config, {**_COMMON, "n_inner": 96}),
    "phi": (
        PhiConfig,
        {**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""Every family that `tiny` builds."""


def tiny(family: str, *, seed: int = 0, layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model in eval mode: 64 wide, 4 query heads of 16, 2 KV heads where the family groups them.

    Parameters
    ----------
    family : one of `FAMILIES`.
    seed : of the weights; the global random state is left as it was.
    layers : number of transformer blocks.
    overrides : fields of the family's configuration, for example ``sliding_window=16`` or ``head_dim=32``.

    Raises
    ------
    UnknownNameError
        The family is not one of `FAMILIES`.
    """
    if family not in _CONFIGS:
        raise UnknownNameError("model family", family, list(FAMILIES))
    make, fields = _CONFIGS[family]
    return _random_model(make(**{**fields, "num_hidden_layers": layers, **overrides}), seed)


def tiny_unsupported(*, seed: int = 0) -> PreTrainedModel:
    """Return a tiny Mamba: a causal language model whose memory is a recurrent state and not a KV cache."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0, eos_token_id=None
    )
    return _random_model(config, seed)


def _random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM  # not annotated, like most of what makes models and tokenizers
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Biases start at zero and norms at one: a bug that drops one of them would not show.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(1.6)  # normalised queries and keys: the deviation is theirs to give
    model.requires_grad_(False)
    model.train(False)
    return model


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_TEXT = """
the of and to is in a an for on that with are was it all one some what this be as by at from or not you he she
special magic number numbers hidden within following text make sure memorize i will quiz about afterwards
mentioned provided key value pass remember grass green sky blue sun yellow here we go there back again
cat dog bird tree house red black white big small
"""
_WORDS = (*"0123456789", *".,:;?!-'\"()={}[]", *_TEXT.split())
_FILL = tuple(f"w{number}" for number in range(VOCABULARY - len(SPECIAL) - len(_WORDS)))


def tiny_tokenizer(*, around: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a real word-level tokenizer with the vocabulary of `tiny`: 128 ids, padding on the left.

    Words are split at blanks, digits and punctuation one by one, so cutting a text at a blank cuts its tokens there;
    case does not matter; words outside the vocabulary become ``<unk>``. Decoding joins words with blanks.

    Parameters
    ----------
    around : special tokens that are put around every text ($A), for example ``<s> $A``, as on Llama, or ``$A </s>``.
    chat_template : of chats, in Jinja; None: it has none.
    """
    words = (*SPECIAL, *_WORDS, *_FILL)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex(r"(?<![a-z])\d"), "isolated"),
        ]
    )
    if around != "$A":
        special = [(word, SPECIAL.index(word)) for word in around.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    return fast
