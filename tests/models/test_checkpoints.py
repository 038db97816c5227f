"""Each form of a checkpoint gives the vectors of the bare state dict, or the stated error.

``IMAGEVEC_WRITE_DOCS=1 pytest tests/models/test_checkpoints.py`` writes the tables of
``docs/checkpoints.md``, which the tests compare.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from imagevec.errors import ImageVecError
from tests.helpers.images import encode, photo
from tests.helpers.pages import check_table
from tests.helpers.pipeline import vector_of
from tests.helpers.shared import ROOT
from tests.models.forms import BARE, FORMS, Form, small

PAGE = ROOT / "docs" / "checkpoints.md"
PNG = encode(photo(64, 64))


@functools.cache
def outcome(form: Form) -> list[float] | str:
    """Returns the vector of a form, or its error message."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"model": small, **form.write(Path(folder))}
        close = options.pop("_close", None)
        try:
            return list(vector_of(PNG, **options))
        except ImageVecError as error:
            text = str(error).replace(folder, "folder").replace(f"factory:{small.__module__}.", "")
            return re.sub(r"\d+ bytes", "n bytes", text)
        finally:
            if close is not None:
                close()


def row(form: Form) -> str:
    found = outcome(form)
    return f"| {form.name} | {f'`{found}`' if isinstance(found, str) else 'loads'} |"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form(form: Form) -> None:
    found = outcome(form)
    if form.error:
        assert isinstance(found, str), "it loads"
        assert form.error in found
        assert "weights_only" not in found and "allowlist" not in found
    else:
        assert found == outcome(BARE)


@pytest.mark.parametrize("group", dict.fromkeys(form.group for form in FORMS))
def test_the_page_has_the_rows(group: str) -> None:
    rows = [row(form) for form in FORMS if form.group == group]
    check_table(PAGE, group, ("form", "result"), rows)
