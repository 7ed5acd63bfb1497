"""Model: a tokenizer that knows whole words, for models whose texts are made of a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Mapping[str, int], pre_tokenizer: Any = None, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of which every word is a token; it pads on the left.

    Parameters
    ----------
    words : ids by word; ``<pad>`` and ``<unk>`` are among them.
    pre_tokenizer : what parts a text into words, of `tokenizers.pre_tokenizers`; None: blanks.
    options : of `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(words), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if pre_tokenizer is None else pre_tokenizer
    make: Any = PreTrainedTokenizerFast  # not annotated
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **options,
    )
    return fast
