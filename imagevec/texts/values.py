"""The values of an Arrow batch of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from imagevec.errors import OptionError


def texts_of(batch: Iterable[Any]) -> Iterator[str | None]:
    """The texts and nulls of one batch: a Series, for a column of strings.

    Raises:
        OptionError: The column's type is another.
    """
    for text in batch:
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise OptionError(
                f"the text column contains {kind} values: use a column of type string"
            )
        yield text
