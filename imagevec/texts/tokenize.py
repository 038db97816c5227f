"""Converts texts to int32 tokens like open_clip's tokenizers (``open_clip/tokenizer.py``).

The vocabulary is one of the plan's files. Workers need the package tokenizers, for open_clip's
models also ftfy and regex, but not PyTorch, open_clip or transformers.
"""

from __future__ import annotations

import functools
import html
import importlib
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imagevec.errors import MissingExtraError
from imagevec.spec import Tokenization

Tokens = npt.NDArray[np.int32]

# Batches are trimmed to a multiple of this length, because engines prepare for each new shape.
_LENGTH_STEP = 8

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class Tokenizer:
    """A model's tokenizer.

    Args:
        vocabulary: The file that ``tokenization`` names.
        tokenization: The steps of the tokenization.

    Raises:
        MissingExtraError: The extra ``clip`` is not installed.
    """

    def __init__(self, vocabulary: Path, tokenization: Tokenization) -> None:
        self._how = tokenization
        self._encoder = _library("tokenizers").Tokenizer.from_file(str(vocabulary))

    def __call__(self, text: str) -> Tokens:
        """Returns the tokens of one text, int32 ``(context_length,)``."""
        cleaned: Any = clean(text, self._how.clean)
        if self._how.words:
            # Not the library's own split: its Unicode tables have a different version.
            regex = _library("regex")
            cleaned = regex.findall(self._how.words, cleaned, regex.IGNORECASE)
        encoded = self._encoder.encode(cleaned, is_pretokenized=bool(self._how.words))
        tokens = np.array(encoded.ids, np.int32)
        if self._how.zeroed is not None:
            tokens[tokens == self._how.zeroed] = 0
        return tokens

    def stack(self, rows: Sequence[Tokens]) -> Tokens:
        """Stacks N rows of int32 ``(context_length,)`` to int32 ``(N, L)``.

        L is ``context_length``, or less if the model does not read padding.
        """
        tokens = np.stack(rows)
        if self._how.reads_padding:
            return tokens
        used = np.flatnonzero(tokens.any(axis=0))[-1] + 1
        return np.ascontiguousarray(tokens[:, : -(-used // _LENGTH_STEP) * _LENGTH_STEP])


def encoder_of(tokenizer: Any, length: int, pad_id: int) -> Any:
    """Converts a tokenizer of transformers to what ``Tokenizer`` reads, on the driver.

    Args:
        tokenizer: A tokenizer of transformers with a ``backend_tokenizer``.
        length: The number of tokens to which texts are truncated or padded.
        pad_id: The token of the padding.

    Returns:
        A ``tokenizers.Tokenizer``.
    """
    encoder = _library("tokenizers").Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.enable_truncation(length, direction=tokenizer.truncation_side)
    encoder.enable_padding(
        length=length,
        direction=tokenizer.padding_side,
        pad_id=pad_id,
        pad_token=tokenizer.pad_token,
    )
    return encoder


def clean(text: str, how: str) -> str:
    """Cleans a text as for training; ``how`` is the ``clean`` of ``Tokenization``."""
    if how == "none":
        return text
    text = html.unescape(html.unescape(_library("ftfy").fix_text(text)))
    if how == "canonicalize":
        text = text.translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


@functools.cache
def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, "clip") from error
