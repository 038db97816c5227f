"""Rows of Spark's image source and of its binaryFile source."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from imagevec.images.values import IMAGE_FIELDS, ImageStruct

GREY, BGR, BGRA = 0, 16, 24  # OpenCV's type numbers


def image_struct(image: Image.Image, mode: int) -> ImageStruct:
    """Creates a row of Spark's image source."""
    pixels = np.atleast_3d(np.asarray(image))
    if mode != GREY:
        pixels = pixels[:, :, [2, 1, 0, *range(3, pixels.shape[2])]]
    return ImageStruct(image.height, image.width, pixels.shape[2], mode, pixels.tobytes())


def struct_batch(
    structs: list[ImageStruct | None], origins: str | list[str] = "file:/a.png"
) -> pd.DataFrame:
    """Returns rows in Spark's form: nullable integers, and the origin first."""
    columns = {
        field: [None if row is None else row[position] for row in structs]
        for position, field in enumerate(IMAGE_FIELDS)
    }
    frame = pd.DataFrame({"origin": origins, **columns})
    numbers = dict.fromkeys(("height", "width", "nChannels", "mode"), "Int32")
    return frame.astype(numbers)


def file_batch(contents: dict[str, bytes | None]) -> pd.DataFrame:
    """Returns rows of the binaryFile source in Spark's form, from the content of each path."""
    return pd.DataFrame(
        {
            "path": list(contents),
            "modificationTime": pd.Timestamp(0, unit="s"),
            "length": [len(content or b"") for content in contents.values()],
            "content": list(contents.values()),
        }
    )
