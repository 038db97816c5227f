"""Passes damaged images through ``decode`` and the stream, which may only raise ``ImageError``.

    python -m tests.helpers.fuzz [--inputs 50000] [--seed N] [--formats HEIF ...]

Each input is a small valid image of some format and mode, damaged in one to four ways. It depends
only on the seed and its number. Separate processes decode the images, so that a crash is noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from imagevec.errors import ImageError
from imagevec.options import FORMATS
from imagevec.spec import Preprocessing
from tests.helpers.heif import alpha, coded, encode_16_bits, grid, heif, imir, irot, overlay
from tests.helpers.images import FORMATS_AND_MODES, encode, of_mode, photo
from tests.helpers.pipeline import decoded, mean_engine, rows, series, stream

CHUNK = 500
STREAMED = 10  # one in this many inputs also passes through the stream


def valid_images(formats: Sequence[str] = FORMATS) -> list[bytes]:
    """Returns one image of each mode of the formats, and further kinds of JPEG and HEIF."""
    images = [
        encode(of_mode(mode, 40, 30), format)
        for format, mode in FORMATS_AND_MODES
        if format in formats
    ]
    if "JPEG" in formats:
        images.append(encode(of_mode("RGB", 40, 30), "JPEG", progressive=True))
    return images + (kinds_of_heif() if "HEIF" in formats else [])


def kinds_of_heif() -> list[bytes]:
    """Returns images of tiles, with alpha, of 10 bits, and turned."""
    tile, opacity = coded(photo(40, 30)), alpha(photo(40, 30).convert("L"), of=1)
    deep = np.asarray(photo(40, 30)).astype(np.uint16) * 257
    turned = dataclasses.replace(tile, properties=[*tile.properties, irot(1), imir(1)])
    return [
        heif([grid(80, 60, 2, [2, 3, 4, 5]), tile, tile, tile, tile]),
        heif([overlay(40, 30, [2, 3]), tile, tile]),
        heif([tile, opacity], data_first=True),
        heif([turned, tile]),
        encode_16_bits("RGB;16", deep, bits=10),
    ]


def truncate(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def flip_bits(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_bits_of_the_header(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data))
    filler = rng.choice([b"\x00", b"\xff", b"\x7f", rng.randbytes(1)])
    length = min(rng.randint(1, 32), len(data) - start)
    data[start : start + length] = filler * length


def insert(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randint(1, 32))


def remove(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 32)]


def repeat(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randint(1, 256)]


def splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


MUTATIONS: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    truncate,
    flip_bits,
    flip_bits_of_the_header,
    overwrite,
    insert,
    remove,
    repeat,
    splice,
)


def damaged(images: Sequence[bytes], seed: int, number: int) -> bytes:
    """Returns input ``number`` of a seed."""
    rng = random.Random(f"{seed}/{number}")
    data = bytearray(rng.choice(images))
    for _ in range(rng.randint(1, 4)):
        if data:
            rng.choice(MUTATIONS)(data, rng, images)
    return bytes(data)


def outcome(data: bytes, through_stream: bool) -> str:
    """Returns ``"decoded"`` or an error code. Any other exception is a bug."""
    try:
        image = decoded(data)
    except ImageError as error:
        result = error.code
    else:
        assert image.pixels.dtype == np.uint8
        assert image.pixels.ndim == 3 and image.pixels.shape[2] == 3
        assert {image.width, image.height} == set(image.pixels.shape[:2])
        result = "decoded"
    if through_stream:
        batch = series([data, None, data])
        (first, null, last) = rows(stream([batch], mean_engine, Preprocessing(), output="struct"))
        assert null["features"] is None and null["error"] is None
        code = "decoded" if first["error"] is None else first["error"].partition(":")[0]
        assert code == result
        assert first["error"] == last["error"]
        assert (first["features"] is None) == (result != "decoded")
    return result


def outcomes(seed: int, numbers: range, formats: Sequence[str] = FORMATS) -> Counter[str]:
    """Counts the outcomes of the inputs."""
    images = valid_images(formats)
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Pillow, about damaged metadata
        for number in numbers:
            try:
                result = outcome(damaged(images, seed, number), number % STREAMED == 0)
            except Exception as error:
                raise AssertionError(f"input {number} of seed {seed}") from error
            counts[result] += 1
    return counts


def _outcomes(task: tuple[int, range, Sequence[str]]) -> Counter[str]:
    return outcomes(*task)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    numbers = range(arguments.inputs)
    chunks = [numbers[at : at + CHUNK] for at in numbers[::CHUNK]]
    tasks = [(arguments.seed, chunk, arguments.formats) for chunk in chunks]
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    # If a process dies, the pool raises here.
    with ProcessPoolExecutor(mp_context=context) as pool:
        for done in pool.map(_outcomes, tasks):
            counts += done
    print(f"{counts.total()} inputs, no exception escaped, no process died")
    for code, count in counts.most_common():
        print(f"  {code:<20}{count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
