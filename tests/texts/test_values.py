from __future__ import annotations

import pandas as pd
import pytest

from imagevec import OptionError
from imagevec.texts.values import texts_of


def test_texts_and_nulls_are_kept_in_order():
    assert list(texts_of(pd.Series(["a", None, "", "b"], dtype=object))) == ["a", None, "", "b"]


@pytest.mark.parametrize(
    ("value", "kind"), [(b"a", "bytes"), (1, "int"), (["a"], "list")], ids=["bytes", "int", "list"]
)
def test_another_type_is_named(value, kind):
    with pytest.raises(OptionError, match=f"values of type {kind}: use a column of type string"):
        list(texts_of(pd.Series(["a", value], dtype=object)))


def test_a_struct_is_named():
    with pytest.raises(OptionError, match="values of type DataFrame"):
        list(texts_of(pd.DataFrame({"text": ["a"]})))
