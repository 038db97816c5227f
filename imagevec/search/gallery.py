"""Writes an HTML page to explore features: neighbours, a map and near-duplicates of images."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagevec.errors import IMAGE_ERROR_CODES, ImageError, ReadError
from imagevec.images.decode import decode
from imagevec.images.reading import read
from imagevec.options import DEFAULTS, FORMATS, OTHER_FORMATS, RANDOM, check_positive, checked
from imagevec.search.neighbours import Vectors, map_2d, near_duplicates, nearest
from imagevec.spec import METADATA_KEY, own_metadata
from imagevec.storage.location import Location
from imagevec.table.read import column_metadata, read_groups, read_vectors

NEAR_DUPLICATE_COSINE = 0.95

_THREADS = 4
_JPEG_QUALITY = 80
_FORMATS = (*FORMATS, *OTHER_FORMATS)  # whatever the table's option was
_BACKGROUND = "white"  # of transparent pixels, as in a browser
_READ_SECONDS = 30  # after which an image gets a placeholder
_UNREADABLE = "the file cannot be read"
_HTML_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&"})


def write_gallery(
    features: str | Path,
    out: str | Path,
    *,
    neighbours: int = 12,
    thumbnail_size: int = 96,
    max_images: int = 2000,
    groups: str | Path | None = None,
    allowed_roots: Sequence[str] = (),
) -> int:
    """Writes a self-contained page, which needs no server, no network and no other file.

    Args:
        features: The folder that ``imagevec extract`` wrote. The images are read again from their
            paths; an image that cannot be read gets a placeholder.
        out: The HTML file to write.
        neighbours: The number of neighbours shown for each image.
        thumbnail_size: The shorter side of a thumbnail in pixels; the longer one is at most twice
            as long.
        max_images: The maximum number of images. From a larger table, the images whose paths have
            the smallest hashes are shown. This sample does not depend on the order of the table,
            and most of it stays when images are added. Only the sample is held in memory.
        groups: The folder that ``imagevec duplicates`` wrote. Its groups are shown instead of those
            of the images on the page. The sample then begins with whole groups, in the order of
            their hashes, except groups that are larger than the remaining space.
        allowed_roots: The folders and URI prefixes under which images may be read; by default
            anywhere. Set it for a table from someone else, whose paths could be URIs of any host.

    Returns:
        The number of images on the page.

    Raises:
        OptionError: A number is below 1, a root is not absolute, or one of the tables does not
            exist.
    """
    roots = checked({"allowed_roots": allowed_roots})["allowed_roots"]
    numbers = {
        "neighbours": neighbours,
        "thumbnail_size": thumbnail_size,
        "max_images": max_images,
    }
    for option, value in numbers.items():
        check_positive(option, value)
    group_of: dict[str, str] = {}
    groups_in_all = None
    if groups is not None:
        group_of, groups_in_all = _choose_groups(groups, max_images)
    paths, vectors, total = _sample(features, max_images, group_of)
    indices, cosines = nearest(vectors, vectors, neighbours + 1)
    places = map_2d(vectors)
    with ThreadPoolExecutor(_THREADS) as pool:
        picture = partial(_picture, size=thumbnail_size, roots=roots, unreachable=set())
        pictures = list(pool.map(picture, paths))
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
    if groups is not None:
        shown = _groups_on_page(paths, group_of)
        min_cosine = column_metadata(groups, "group").get("min_cosine")
    else:
        shown = near_duplicates(vectors, NEAR_DUPLICATE_COSINE)
        min_cosine = NEAR_DUPLICATE_COSINE
    page = _page(
        {
            "folder": folder,
            "total": total,
            "madeBy": _made_by(column_metadata(features, "features")),
            "thumbnailSize": thumbnail_size,
            "images": images,
            "groups": shown,
            "groupsInAll": groups_in_all,
            "minCosine": min_cosine,
        }
    )
    Path(out).write_text(page, encoding="utf-8")
    return len(images)


def _sample(
    features: str | Path, count: int, group_of: Mapping[str, str]
) -> tuple[list[str], Vectors, int]:
    """Selects the images of ``group_of``, and then those with the smallest hashes.

    Returns:
        At most ``count`` paths, sorted, their vectors, float32 ``(N, D)``, and the number of images
        in the table.
    """
    kept: list[tuple[tuple[bool, bytes, str], Vectors]] = []
    total = 0
    for paths, vectors in read_vectors(features):
        total += len(paths)
        keys = [(path not in group_of, _hash(path), path) for path in paths]
        new = [
            (key, vectors[row].copy())  # a view would keep the whole block
            for row, key in enumerate(keys)
            if len(kept) < count or key < kept[-1][0]
        ]
        kept = sorted(kept + new, key=itemgetter(0))[:count]
    kept.sort(key=lambda image: image[0][2])
    return [path for (_, _, path), _ in kept], np.stack([vector for _, vector in kept]), total


def _choose_groups(groups: str | Path, count: int) -> tuple[dict[str, str], int]:
    """Selects whole groups with at most ``count`` images in total.

    The table is read twice. Only the sizes of ``count`` groups are held in memory at a time.

    Returns:
        The group of each image, and the number of groups in the table.
    """
    sizes: Counter[tuple[bytes, str]] = Counter()
    limit: tuple[bytes, str] | None = None  # larger keys have been dropped
    in_all = 0
    for paths, names in read_groups(groups):
        in_all += sum(map(str.__eq__, paths, names))  # a group has its smallest path once
        for name, count_here in Counter(names).items():
            key = (_hash(name), name)
            if limit is None or key <= limit:
                sizes[key] += count_here
        if len(sizes) > count:
            sizes = Counter({key: sizes[key] for key in sorted(sizes)[:count]})
            limit = max(sizes)
    chosen = set()
    left = count
    for key in sorted(sizes):
        if sizes[key] <= left:
            left -= sizes[key]
            chosen.add(key[1])
    group_of: dict[str, str] = {}
    for paths, names in read_groups(groups):
        rows = zip(paths, names, strict=True)
        group_of.update((path, name) for path, name in rows if name in chosen)
    return group_of, in_all


def _groups_on_page(paths: list[str], group_of: Mapping[str, str]) -> list[list[int]]:
    """Returns the indices of each group of two or more, ascending, by first index."""
    members = defaultdict(list)
    for index, path in enumerate(paths):
        if path in group_of:
            members[group_of[path]].append(index)
    return [indices for indices in members.values() if len(indices) > 1]


def _hash(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=8).digest()


def _made_by(metadata: Mapping[str, Any]) -> str:
    """Describes the model and its settings; empty if the column has no provenance."""
    made_of = own_metadata(metadata).get(METADATA_KEY)
    if made_of is None:
        return ""
    weights = ["random weights"] if made_of["weights"] == RANDOM else []
    return ", ".join(
        [
            made_of["model"],
            *weights,
            f"layer {made_of['layer']}",
            f"{made_of['num_features']:,} features",
            made_of["precision"],
        ]
    )


def _page(data: dict[str, Any]) -> str:
    """Returns the template with the data, escaped so that no text can close its element."""
    template = importlib.resources.files("imagevec.search").joinpath("gallery.html")
    text = json.dumps(data, separators=(",", ":")).translate(_HTML_ESCAPES)
    return template.read_text(encoding="utf-8").replace("{{ data }}", text)


def _common_folder(paths: list[str]) -> str:
    """Returns the common folder of paths with a trailing slash, or an empty string."""
    parts = os.path.commonprefix([path.split("/")[:-1] for path in paths])
    return "".join(f"{part}/" for part in parts)


def _picture(
    path: str, size: int, roots: Sequence[str], unreachable: set[tuple[str, str]]
) -> dict[str, Any]:
    """Returns a thumbnail as a data URI with the image's width and height, or the problem.

    Args:
        path: The path of the image.
        size: See ``thumbnail_size``.
        roots: See ``allowed_roots``.
        unreachable: The schemes and hosts that did not answer, which are not tried again.
    """
    location = Location.parse(path)
    store = (location.store_scheme, location.host)
    if store in unreachable:
        return {"problem": _UNREADABLE}
    try:
        decoded = decode(
            read(path, roots, _READ_SECONDS, _FORMATS),
            max_pixels=DEFAULTS["max_pixels"],
            formats=_FORMATS,
            min_side=2 * size,
            background=_BACKGROUND,
            truncated="accept",
        )
    except ImageError as error:
        return {"problem": IMAGE_ERROR_CODES[error.code]}
    except ReadError as error:
        if not location.is_local and not isinstance(error.__cause__, PermissionError):
            unreachable.add(store)
        return {"problem": _UNREADABLE}
    image = Image.fromarray(decoded.pixels)
    scale = min(1, size / min(image.size), 2 * size / max(image.size))
    sides = [max(1, round(side * scale)) for side in image.size]
    file = io.BytesIO()
    image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=_JPEG_QUALITY
    )
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"thumbnail": uri, "width": decoded.width, "height": decoded.height}
