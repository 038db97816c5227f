"""Each kind of file shows its picture, or is refused by name, as ``docs/formats.md`` says.

``IMAGEVEC_WRITE_DOCS=1 pytest tests/images/test_kinds.py`` writes the tables and the pictures of
the page, which the tests compare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.photos import PHOTOS
from imagevec import ImageError
from imagevec.images.decode import Pixels
from tests.helpers.images import encode
from tests.helpers.pages import WRITES, check_table, tables
from tests.helpers.pipeline import decoded
from tests.helpers.shared import ROOT
from tests.images.kinds import KINDS, Kind
from tests.images.pictures import PICTURES, cut, photo_of

PAGE = ROOT / "docs" / "formats.md"


def outcome(kind: Kind, options: Mapping[str, Any]) -> Pixels | str:
    """Returns the pixels of a file, or its error."""
    try:
        return decoded(kind.data, **options).pixels
    except ImageError as error:
        return re.sub(r" \(\d+ bytes not processed\)", "", str(error))


def is_shown(kind: Kind, pixels: Pixels) -> bool:
    """Returns whether pixels are those of the picture, or of the part that is left of it.

    The limit is the distance of two vectors of equal length whose cosine is 0.999.
    """
    assert kind.shows is not None
    rows, from_end = len(kind.shows), kind.name.startswith("BMP")
    part = pixels[-rows:] if from_end else pixels[:rows]
    shown = kind.shows.astype(float)
    return bool(np.linalg.norm(part - shown) <= 0.0447 * np.linalg.norm(shown))


def code(option: Any) -> str:
    value = tuple(option[1]) if isinstance(option[1], list) else option[1]
    return f"`{option[0]}={value!r}`".replace("'", '"').replace('("', '"').replace('",)', '"')


def row(kind: Kind) -> str:
    found = outcome(kind, {})
    default = f"`{found}`" if isinstance(found, str) else kind.default
    cells = [kind.name, default]
    if kind.group != "refused":
        shown = "the rest of the picture" if "cut in half" in kind.name else "the picture"
        cells.append(f"{code(*kind.options.items())}: {shown}" if kind.options else "")
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind(kind: Kind) -> None:
    by_default = outcome(kind, {})
    if kind.shows is None:
        assert isinstance(by_default, str) and by_default.startswith(f"{kind.default}: ")
        return
    with_options = outcome(kind, kind.options)
    assert not isinstance(with_options, str), with_options
    assert is_shown(kind, with_options)
    if not kind.options:
        return
    if isinstance(by_default, str):
        assert by_default.startswith(f"{kind.default}: ")
    elif kind.default != "the picture":
        assert not is_shown(kind, by_default)


@pytest.mark.parametrize("group", dict.fromkeys(kind.group for kind in KINDS))
def test_the_page_has_the_rows(group: str) -> None:
    rows = [row(kind) for kind in KINDS if kind.group == group]
    head = ("file", "error") if group == "refused" else ("file", "by default", "with an option")
    check_table(PAGE, group, head, rows)


def share_of_wrong_pixels(lost: int, **options: Any) -> float:
    """Returns the mean share in photos as JPEGs that lost a percentage of their bytes."""
    shares = []
    for place in PHOTOS:
        data = encode(photo_of(Path(place).stem), "JPEG", quality=85, **options)
        whole = decoded(data).pixels.astype(int)
        rest = decoded(cut(data, lost), truncated="accept").pixels
        shares.append((np.abs(whole - rest).max(2) > 8).mean())
    return float(np.mean(shares))


def test_the_page_has_the_shares_of_wrong_pixels() -> None:
    shares = [
        [share_of_wrong_pixels(lost, progressive=progressive) for progressive in (False, True)]
        for lost in (1, 10, 50)
    ]
    if WRITES:
        cells = [[f"{100 * share:.0f} %" for share in row] for row in shares]
        rows = [
            f"| {lost} % | {' | '.join(c)} |" for lost, c in zip((1, 10, 50), cells, strict=True)
        ]
        check_table(PAGE, "lost", ("lost bytes", "baseline JPEG", "progressive JPEG"), rows)
    told = [re.findall(r"(\d+) %", row)[1:] for row in tables(PAGE)["lost"]]
    assert np.abs(100 * np.array(shares) - np.array(told, float)).max() < 2  # of other encoders


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_the_page_is_what_is_decoded(name: str) -> None:
    file = PAGE.parent / "images" / f"{name}.png"
    drawn = PICTURES[name]()
    if WRITES:
        drawn.save(file, optimize=True)
    kept = Image.open(file).convert("RGB")
    assert kept.size == drawn.size
    difference = np.abs(np.asarray(kept, np.float32) - np.asarray(drawn, np.float32))
    assert difference.mean() < 2  # fonts and JPEG decoders differ
