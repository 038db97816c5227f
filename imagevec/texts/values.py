"""The values of an Arrow batch of texts."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from imagevec.errors import OptionError


def texts_of(batch: pd.Series | pd.DataFrame) -> Iterator[str | None]:
    """The texts and nulls of one batch, as Spark hands it to a pandas UDF.

    Raises:
        OptionError: The column's type is not string.
    """
    for text in [batch] if isinstance(batch, pd.DataFrame) else batch:  # of a struct's fields
        if text is not None and not isinstance(text, str):
            raise OptionError(
                f"the text column contains values of type {type(text).__name__}: "
                "use a column of type string"
            )
        yield text
