"""Texts to int32 tokens, as open_clip's tokenizers make them (``open_clip/tokenizer.py``).

The vocabulary comes with the plan, as a file. A worker needs the packages ftfy, regex and
tokenizers, and neither PyTorch nor open_clip.
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

# Batches are cut to a multiple of so many tokens: an engine prepares for each shape it meets.
_LENGTH_STEP = 8

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class Tokenizer:
    """What makes the tokens of one model's texts.

    Args:
        vocabulary: The file that ``tokenization`` names.
        tokenization: How.

    Raises:
        MissingExtraError: Without the extra ``clip``.
    """

    def __init__(self, vocabulary: Path, tokenization: Tokenization) -> None:
        self._how = tokenization
        self._regex, tokenizers = _library("regex"), _library("tokenizers")
        self._encoder = tokenizers.Tokenizer.from_file(str(vocabulary))

    def __call__(self, text: str) -> Tokens:
        """The tokens of one text, int32 ``(context_length,)``."""
        cleaned: Any = clean(text, self._how.clean)
        if self._how.words:
            # Not the library's own split: its tables of Unicode are of another version.
            cleaned = self._regex.findall(self._how.words, cleaned, self._regex.IGNORECASE)
        encoded = self._encoder.encode(cleaned, is_pretokenized=bool(self._how.words))
        tokens = np.array(encoded.ids, np.int32)
        if self._how.zeroed is not None:
            tokens[tokens == self._how.zeroed] = 0
        return tokens

    def stack(self, rows: Sequence[Tokens]) -> Tokens:
        """A batch: N times int32 ``(context_length,)`` to int32 ``(N, L)``.

        L is ``context_length``, or less where padding is not read.
        """
        tokens = np.stack(rows)
        if self._how.reads_padding:
            return tokens
        used = np.flatnonzero(tokens.any(axis=0))[-1] + 1
        return np.ascontiguousarray(tokens[:, : -(-used // _LENGTH_STEP) * _LENGTH_STEP])


def clean(text: str, how: str) -> str:
    """A text as its model was trained on it; ``how`` is the one of ``Tokenization``."""
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
