"""Workers that have too little memory, or cannot start threads."""

from __future__ import annotations

import ast
import functools
import gc
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagevec import ImageError, Preprocessing
from imagevec.images.isolation import isolated
from imagevec.images.prepare import prepare
from imagevec.images.values import Value
from imagevec.options import FORMATS
from tests.helpers.bombs import BOMBS, SIGNATURES, jpeg_of_scans, segment
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import decoded, execution_options, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


def refused(data: bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    return error.value


IMAGES: list[tuple[str, str, dict[str, Any]]] = [
    *((format, "RGB", {}) for format in FORMATS),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("PNG", "I;16", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
]

OUTCOMES = """
import functools
from imagevec.images.prepare import prepare
from imagevec.images.values import Value
from imagevec.options import DEFAULTS
from imagevec.spec import ExecutionOptions, Preprocessing
from tests.helpers.images import encode, of_mode
from tests.helpers.memory import outcomes

def prepared(data):
    row = prepare(Value(data), Preprocessing(), ExecutionOptions.of(DEFAULTS))
    return "decoded" if row.error is None else str(row.error)

files = []
for format, mode, options in {images}:
    prepared(encode(of_mode(mode, 64, 64), format, **options))  # imports what a worker has
    files.append(encode(of_mode(mode, 1000, 800), format, **options))
print([outcomes(functools.partial(prepared, file), range(0, 24, 3)) for file in files])
"""


@pytest.fixture(scope="module")
def outcomes() -> list[list[str]]:
    """What becomes of each of ``IMAGES`` in processes that may allocate 0, 3, ... 21 MB."""
    # So that large blocks are never taken from memory that this process has, but does not use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    printed = run_python(OUTCOMES.format(images=IMAGES), **environment)
    found: list[list[str]] = ast.literal_eval(printed)
    return found


@pytest.mark.parametrize(
    "number", range(len(IMAGES)), ids=lambda number: "-".join(IMAGES[number][:2])
)
def test_lack_of_memory_is_not_a_bad_image(number, outcomes):
    assert set(outcomes[number]) == {"MemoryError", "decoded"}


NO_THREADS = """
import os, resource
from imagevec.images.decode import decode
if os.getuid() == 0:
    os.setuid(65534)  # the limit does not count for root
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
print(decode({data!r}, max_pixels=10_000, formats=('AVIF',)).pixels.shape)
"""


def test_avif_is_decoded_where_no_thread_can_start():
    data = encode(photo(80, 60), "AVIF")
    assert run_python(NO_THREADS.format(data=data)).strip() == "(60, 80, 3)"


def tiled_tiff(width: int, length: int) -> bytes:
    """Returns a TIFF of 64x64 pixels whose tiles have other sides."""
    content = zlib.compress(bytes(3 * 64 * 64))
    entries = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(322, width), (323, length), (324, 0), (325, len(content))]
    start = 8 + 2 + 12 * len(entries) + 4
    file = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries:
        file += struct.pack("<HHII", tag, 4, 1, start if tag == 324 else value)
    return file + bytes(4) + content


def test_tiles_larger_than_max_pixels_are_not_decoded():
    assert decoded(tiled_tiff(64, 64)).pixels.shape == (64, 64, 3)
    for sides in ((20_000, 30_000), (1 << 20, 1 << 20), (64, 2**32 - 1)):
        assert refused(tiled_tiff(*sides)).code == "too_large"
    assert refused(tiled_tiff(64, 64), max_pixels=64 * 64 - 1).code == "too_large"
    assert refused(tiled_tiff(64, 0)).code == "corrupt"


def webp(width: int, height: int) -> bytes:
    """Returns an animated WebP whose canvas is larger than its only frame of 16x16 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content

    def sides(*pixels: int) -> bytes:
        return b"".join((side - 1).to_bytes(3, "little") for side in pixels)

    frame = encode(Image.new("RGB", (16, 16)), "WEBP")[12:]
    body = chunk(b"VP8X", bytes([2, 0, 0, 0]) + sides(width, height)) + chunk(b"ANIM", bytes(6))
    body += chunk(b"ANMF", bytes(6) + sides(16, 16) + bytes(4) + frame)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("sides", [(16_384, 16_384), (60_000, 60_000)])
def test_a_webp_canvas_above_the_limit_is_not_allocated(sides, monkeypatch):
    assert decoded(webp(100, 200)).pixels.shape == (200, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow checks nothing
    assert refused(webp(*sides)).code == "too_large"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=str)
@pytest.mark.parametrize("sides", [(1, 2), (300, 7), (5, 700)])
def test_the_size_of_a_webp_is_read_from_its_header(options, sides):
    data = encode(photo(*sides), "WEBP", **options)
    width, height = sides
    assert decoded(data, max_pixels=width * height).pixels.shape == (height, width, 3)
    error = refused(data, max_pixels=width * height - 1)
    assert error.detail.startswith(f"{width}x{height} pixels")


BOMBED = """
import functools, warnings
from imagevec.images.prepare import prepare
from imagevec.images.values import Value
from imagevec.options import DEFAULTS
from imagevec.spec import ExecutionOptions, Preprocessing
from tests.helpers.bombs import BOMBS
from tests.helpers.images import encode, photo
from tests.helpers.memory import outcomes

warnings.simplefilter("ignore")

def prepared(data):
    row = prepare(Value(data), Preprocessing(), ExecutionOptions.of(DEFAULTS))
    return "decoded" if row.error is None else row.error.code

for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
    prepared(encode(photo(), format))
found = {}
for name, (make, _) in BOMBS.items():
    data = make()
    megabytes = 24 + 4 * len(data) // 1_000_000
    (found[name],) = outcomes(functools.partial(prepared, data), [megabytes])
print(found)
"""


@pytest.fixture(scope="module")
def bombed() -> dict[str, str]:
    """What becomes of each of ``BOMBS`` with 24 MB and four times its length."""
    found: dict[str, str] = ast.literal_eval(
        run_python(BOMBED, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    )
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(name, bombed):
    assert bombed[name] == BOMBS[name][1]


@pytest.mark.filterwarnings("ignore")
def test_isolated_bombs_are_judged_alike():
    prepare_isolated = isolated(
        functools.partial(prepare, preprocessing=Preprocessing(), options=execution_options())
    )
    for name, (make, expected) in BOMBS.items():
        row = prepare_isolated(Value(make()))
        assert ("decoded" if row.error is None else row.error.code) == expected, name


def test_jpegs_of_more_than_100_scans_are_refused():
    assert decoded(jpeg_of_scans(100, 2000)).pixels.shape == (2000, 2000, 3)
    error = refused(jpeg_of_scans(101, 2000))
    assert (error.code, error.detail) == ("unsupported_format", "JPEG of more than 100 scans")


def test_scans_are_counted_in_the_pixels_alone():
    thumbnails = segment(0xE2, b"\xff\xda" * 1000)
    progressive = encode(photo(1000, 800), "JPEG", progressive=True)
    data = progressive[:2] + thumbnails + progressive[2:]
    assert np.array_equal(decoded(data).pixels, decoded(progressive).pixels)


def test_small_jpegs_of_many_scans_are_decoded():
    assert decoded(jpeg_of_scans(101)).pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name != "HEIF"])
def test_an_error_does_not_keep_the_file(name):
    data = SIGNATURES[name] + bytes(70_000)
    gc.disable()
    try:
        before = sys.getrefcount(data)
        row = prepare(Value(data), Preprocessing(), execution_options())
        assert row.error is not None
        assert sys.getrefcount(data) == before
    finally:
        gc.enable()


LARGE = """
import functools, warnings
from pathlib import Path
from imagevec.images.prepare import prepare
from imagevec.images.reading import read_ahead
from imagevec.images.values import Value
from imagevec.options import DEFAULTS
from imagevec.spec import ExecutionOptions, Preprocessing
from tests.helpers.images import encode, photo
from tests.helpers.memory import outcomes

def prepared(paths):
    codes = []
    for value in read_ahead(Value(path) for path in paths):
        row = prepare(value, Preprocessing(), ExecutionOptions.of(DEFAULTS))
        codes.append("decoded" if row.error is None else row.error.code)
    return " ".join(codes)

for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
    Path({folder!r}, "warm").write_bytes(encode(photo(), format))
    prepared([str(Path({folder!r}, "warm"))])
print(outcomes(functools.partial(prepared, {paths!r}), [{megabytes}]))
"""


def large(folder: Path, paths: list[str], megabytes: int) -> list[str]:
    """What becomes of files in a process that may allocate so much. They are read in threads."""
    code = LARGE.format(folder=str(folder), paths=paths, megabytes=megabytes)
    (outcome,) = ast.literal_eval(
        run_python(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    )
    codes: str = outcome
    return codes.split()


def sparse(path: Path, start: bytes, size: int) -> str:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return str(path)


def test_a_large_file_that_is_no_image_is_not_read(tmp_path):
    starts = {"zeros": b"", "text": b"no image", **SIGNATURES}
    paths = [sparse(tmp_path / name, start, 2 << 30) for name, start in starts.items()]
    expected = ["unsupported_format"] * 2 + ["too_large"] * len(SIGNATURES)
    assert large(tmp_path, paths, 150) == expected  # of which 8 threads have stacks


def test_large_files_are_not_read_ahead_nor_copied(tmp_path):
    paths = [
        sparse(tmp_path / name, start, 100 << 20)
        for name, start in SIGNATURES.items()
        if name != "HEIF"  # its decoder is an extra
    ]
    codes = large(tmp_path, paths, 330)  # this one, the one before, and the stacks of the threads
    assert set(codes) <= {"corrupt", "truncated"} and len(codes) == len(paths)
