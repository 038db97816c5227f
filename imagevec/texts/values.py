"""Values of an Arrow batch of texts."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from imagevec.errors import OptionError


def texts_of(batch: pd.Series | pd.DataFrame) -> Iterator[str | None]:
    """Yields the texts and nulls of a batch, as Spark passes it to a pandas UDF.

    Raises:
        OptionError: The type of the column is not string.
    """
    for text in [batch] if isinstance(batch, pd.DataFrame) else batch:  # a data frame is a struct
        if text is not None and not isinstance(text, str):
            raise OptionError(
                f"the text column contains values of type {type(text).__name__}: "
                "use a column of type string"
            )
        yield text
