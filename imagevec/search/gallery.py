"""One HTML page to look at features with: neighbours, a map and near-duplicates of images."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from imagevec.errors import IMAGE_ERROR_CODES, ImageError
from imagevec.images.decode import decode
from imagevec.images.reading import read
from imagevec.options import DEFAULTS, FORMATS, check_positive
from imagevec.search.neighbours import map_2d, near_duplicates, nearest
from imagevec.table.read import read_features

NEAR_DUPLICATE_COSINE = 0.95

_THREADS = 4
_JPEG_QUALITY = 80
_HTML_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&"})


def write_gallery(
    features: str | Path,
    out: str | Path,
    *,
    neighbours: int = 12,
    thumbnail_size: int = 96,
    max_images: int = 2000,
) -> int:
    """Writes a page that needs nothing else: no server, no network, no other file.

    Args:
        features: The folder that ``imagevec extract`` wrote. The images are read again, from their
            paths in it; one that cannot be read has a placeholder.
        out: The HTML file.
        neighbours: How many are shown of each image.
        thumbnail_size: Pixels of a thumbnail's shorter side; the longer one has at most twice that.
        max_images: Of more, that many are taken, evenly spread over the sorted paths.

    Returns:
        The number of images on the page.

    Raises:
        OptionError: A number is below 1, or there is no such table.
    """
    numbers = {
        "neighbours": neighbours,
        "thumbnail_size": thumbnail_size,
        "max_images": max_images,
    }
    for option, value in numbers.items():
        check_positive(option, value)
    all_paths, all_vectors = read_features(features)
    total = len(all_paths)
    order = sorted(range(total), key=all_paths.__getitem__)
    count = min(total, max_images)
    kept = [order[place * total // count] for place in range(count)]
    paths, vectors = [all_paths[index] for index in kept], all_vectors[kept]

    indices, cosines = nearest(vectors, vectors, neighbours + 1)
    places = map_2d(vectors)
    with ThreadPoolExecutor(_THREADS) as pool:
        pictures = list(pool.map(partial(_picture, size=thumbnail_size), paths))
    folder = _common_folder(paths)
    images = [
        {
            "name": path.removeprefix(folder),
            "place": [round(float(x), 4) for x in places[index]],
            "neighbours": [
                (int(other), round(float(cosine), 4))
                for other, cosine in zip(indices[index], cosines[index], strict=True)
                if other != index
            ][:neighbours],
            **pictures[index],
        }
        for index, path in enumerate(paths)
    ]
    page = _page(
        {
            "folder": folder,
            "total": total,
            "thumbnailSize": thumbnail_size,
            "images": images,
            "groups": near_duplicates(vectors, NEAR_DUPLICATE_COSINE),
            "minCosine": NEAR_DUPLICATE_COSINE,
        }
    )
    Path(out).write_text(page, encoding="utf-8")
    return len(images)


def _page(data: dict[str, Any]) -> str:
    """The template with the data in it. No text of theirs can end the element that holds them."""
    template = importlib.resources.files("imagevec.search").joinpath("gallery.html")
    text = json.dumps(data, separators=(",", ":")).translate(_HTML_ESCAPES)
    return template.read_text(encoding="utf-8").replace("{{ data }}", text)


def _common_folder(paths: list[str]) -> str:
    """With a slash at its end, or empty."""
    parts = os.path.commonprefix([path.split("/")[:-1] for path in paths])
    return "".join(f"{part}/" for part in parts)


def _picture(path: str, size: int) -> dict[str, Any]:
    """A thumbnail as a URI, and the image's width and height; or the problem with the file."""
    try:
        pixels, width, height = decode(
            read(path), max_pixels=DEFAULTS["max_pixels"], formats=FORMATS, min_side=2 * size
        )
    except ImageError as error:
        return {"problem": IMAGE_ERROR_CODES[error.code]}
    image = Image.fromarray(pixels)
    scale = min(1, size / min(image.size), 2 * size / max(image.size))
    sides = [max(1, round(side * scale)) for side in image.size]
    file = io.BytesIO()
    image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=_JPEG_QUALITY
    )
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"thumbnail": uri, "width": width, "height": height}
