"""JPEGs that lack only their end marker, and those that lack more."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from imagevec import ImageError
from imagevec.images.decode import Pixels
from imagevec.images.jpeg import up_to_cut, with_end
from tests.helpers.images import encode, of_mode, photo
from tests.helpers.pipeline import decoded, small_row

END = b"\xff\xd9"
SCAN = b"\xff\xda"

DJPEG = shutil.which("djpeg")
JPEGTRAN = shutil.which("jpegtran")
needs_djpeg = pytest.mark.skipif(DJPEG is None, reason="djpeg of libjpeg-turbo is not installed")
needs_jpegtran = pytest.mark.skipif(
    JPEGTRAN is None, reason="jpegtran of libjpeg-turbo is not installed"
)


def by_djpeg(data: bytes) -> Pixels:
    """The pixels of a JPEG that is not CMYK, uint8 ``(H, W, 3)``."""
    done = subprocess.run([str(DJPEG), "-pnm"], input=data, capture_output=True)
    return np.array(Image.open(io.BytesIO(done.stdout)).convert("RGB"))


def verdict(data: bytes) -> str:
    try:
        decoded(data)
    except ImageError as error:
        return error.code
    return "decoded"


def ycck() -> bytes:
    """A JPEG of 4 channels with subsampled chroma, which Pillow does not write."""
    pixels = np.ascontiguousarray(np.asarray(of_mode("CMYK", 97, 53)))
    data: bytes = simplejpeg.encode_jpeg(pixels, colorspace="CMYK", colorsubsampling="420")
    return data


def first_of_mpo() -> bytes:
    data = encode(photo(97, 53), "MPO", save_all=True, append_images=[photo(97, 53, seed=2)])
    return data[: data.index(END + b"\xff\xd8") + 2]


PHOTO = photo(97, 53)
FLAT = Image.new("RGB", (97, 53), (10, 200, 30))

JPEGS = {
    "4:2:0": encode(PHOTO, "JPEG"),
    "4:4:4": encode(PHOTO, "JPEG", subsampling=0, quality=95),
    "optimized": encode(PHOTO, "JPEG", optimize=True),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "restart intervals": encode(PHOTO, "JPEG", restart_marker_blocks=2),
    "progressive with restart intervals": encode(
        PHOTO, "JPEG", progressive=True, restart_marker_rows=1
    ),
    "grey": encode(of_mode("L", 97, 53), "JPEG"),
    "grey progressive": encode(of_mode("L", 97, 53), "JPEG", progressive=True),
    "RGB": encode(PHOTO, "JPEG", keep_rgb=True),
    "CMYK": encode(of_mode("CMYK", 97, 53), "JPEG"),
    "CMYK progressive": encode(of_mode("CMYK", 97, 53), "JPEG", progressive=True),
    "YCCK": ycck(),
    "MPO": first_of_mpo(),
    "one colour": encode(FLAT, "JPEG"),
    "one colour optimized": encode(FLAT, "JPEG", optimize=True),
    "one grey optimized": encode(FLAT.convert("L"), "JPEG", optimize=True),
    "one colour progressive": encode(FLAT, "JPEG", progressive=True),
}

WITHOUT_END = {
    "nothing": b"",
    "half": b"\xff",
    "zeros": bytes(2),
    "one zero": bytes(1),
    "half and a zero": b"\xff\0",
    "a zero and half": b"\0\xff",
    "many zeros": bytes(900),
    "other bytes": b"\xab\xcd",
    "another byte": b"A",
    "a byte and a zero": b"\x9b\0",
    "a start marker": b"\xff\xd8",
    "a restart marker": b"\xff\xd0",
    "a table's marker": b"\xff\xc4",
    "a scan's marker": SCAN,
    "a comment's marker": b"\xff\xfe",
}


@pytest.mark.parametrize("end", WITHOUT_END)
@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_without_its_end_marker_is_complete(kind, end):
    data = JPEGS[kind]
    assert data.endswith(END)
    image = decoded(data[:-2] + WITHOUT_END[end])
    assert np.array_equal(image.pixels, decoded(data).pixels)
    assert not image.truncated


@needs_djpeg
@pytest.mark.parametrize(
    "kind", [kind for kind in JPEGS if kind not in ("CMYK progressive", "CMYK", "YCCK")]
)
def test_djpeg_shows_the_same_pixels_without_the_end_marker(kind):
    data = JPEGS[kind][:-2]
    assert np.array_equal(by_djpeg(data), decoded(data).pixels)


def test_trailing_bytes_after_the_end_are_accepted():
    data = JPEGS["4:2:0"]
    for more in (bytes(9), b"garbage", data):
        assert np.array_equal(decoded(data + more).pixels, decoded(data).pixels)


def test_second_picture_of_an_mpo_may_be_cut():
    data = encode(PHOTO, "MPO", save_all=True, append_images=[photo(97, 53, seed=2)])
    image = decoded(data[:-500])
    assert np.array_equal(image.pixels, decoded(data).pixels)
    assert not image.truncated


def test_jpeg_without_its_end_marker_is_scaled_too():
    for options in ({}, {"progressive": True}):
        data = encode(photo(400, 300), "JPEG", **options)
        image = decoded(data[:-2], min_side=50)
        assert image.pixels.shape == (75, 100, 3)
        assert np.array_equal(image.pixels, decoded(data, min_side=50).pixels)


def test_jpeg_without_its_end_marker_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO, "JPEG", exif=exif)
    assert np.array_equal(decoded(data[:-2]).pixels, decoded(data).pixels)


def test_jpeg_without_its_end_marker_is_complete_in_the_stream():
    row = small_row(JPEGS["progressive"][:-2])
    assert (row["error"], row["truncated"], row["width"]) == (None, False, 97)
    assert np.array_equal(row["features"], small_row(JPEGS["progressive"])["features"])


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if "one" not in kind])
def test_jpeg_that_lacks_one_more_byte_is_truncated(kind):
    data = JPEGS[kind]
    lengths = range(data.index(SCAN) + 20, len(data) - 2, 13)
    for cut in {*lengths, *range(len(data) - 12, len(data) - 2)}:
        assert verdict(data[:cut]) == "truncated"
        assert with_end(data[:cut] + bytes(len(data) - cut)) is None


@pytest.mark.parametrize("kind", [kind for kind in JPEGS if "progressive" in kind])
def test_progressive_jpeg_that_lacks_scans_is_truncated(kind):
    """libjpeg has no warning about one that is cut between two scans."""
    data = JPEGS[kind]
    scans = [position for position in range(len(data)) if data[position:].startswith(SCAN)]
    assert len(scans) > 3
    starts = [start for start in markers(data) if start > scans[0]]
    assert len(starts) >= len(scans)
    for start in starts[:-1]:
        simplejpeg.decode_jpeg(data[:start] + END, "CMYK" if "CMYK" in kind else "RGB")
        assert with_end(data[:start]) is None
        assert verdict(data[:start]) == "truncated"
    assert verdict(data[: starts[-1]]) == "decoded"  # only the end marker is missing


def markers(data: bytes) -> list[int]:
    """The positions of all markers, without those within segments and of restarts."""
    positions, position = [], 2
    while position < len(data) - 1:
        if data[position] != 0xFF or data[position + 1] in (0, 0xFF, *range(0xD0, 0xD8)):
            position += 1
            continue
        positions.append(position)
        (length,) = struct.unpack_from(">H", data[position + 2 :] + bytes(2))
        position += 2 + length
    return positions


@needs_jpegtran
@pytest.mark.parametrize("script", ["0;1;2;", "0 2;1;"])
def test_baseline_jpeg_of_several_scans_needs_all(script, tmp_path):
    (tmp_path / "scans").write_text(script)
    command = [str(JPEGTRAN), "-scans", str(tmp_path / "scans")]
    data = subprocess.run(command, input=JPEGS["4:4:4"], capture_output=True, check=True).stdout
    expected = decoded(data).pixels
    assert np.array_equal(expected, decoded(JPEGS["4:4:4"]).pixels)
    for end in WITHOUT_END.values():
        assert np.array_equal(decoded(data[:-2] + end).pixels, expected)
    starts = [start for start in markers(data) if start > data.index(SCAN)]
    for start in starts[:-1]:
        assert verdict(data[:start]) == "truncated"


@needs_jpegtran
def test_jpeg_whose_coder_does_not_notice_the_end_is_not_completed():
    """Arithmetic coding drops zeros at the end, so that libjpeg has no warning."""
    command = [str(JPEGTRAN), "-arithmetic"]
    data = subprocess.run(command, input=JPEGS["4:2:0"], capture_output=True, check=True).stdout
    assert b"\xff\xc9" in data
    assert with_end(data[:-2]) is None
    assert with_end(data[:-300]) is None
    whole = decoded(data).pixels
    for length in (len(data) - 2, len(data) - 300):
        assert verdict(data[:length]) == "truncated"
        part = decoded(data[:length], truncated="accept")
        assert part.truncated
        assert np.array_equal(part.pixels[:16], whole[:16])


def test_end_inside_the_file_is_the_end():
    data = JPEGS["4:2:0"]
    assert with_end(data) is None
    assert with_end(data + b"more") is None
    assert up_to_cut(data) is None


@pytest.mark.parametrize("cut", [2, 3, 20, 200])
def test_file_without_pixels_cannot_be_completed(cut):
    data = JPEGS["4:2:0"][:cut]
    assert with_end(data) is None
    assert up_to_cut(data) is None


def test_thumbnail_in_exif_is_no_end():
    exif = Image.Exif()
    exif[0x010E] = encode(photo(20, 15), "JPEG")  # a whole JPEG within a segment
    data = encode(PHOTO, "JPEG", exif=exif)
    assert data.count(END) == 2
    assert np.array_equal(decoded(data[:-2]).pixels, decoded(data).pixels)
    assert verdict(data[:-300]) == "truncated"


def test_file_of_markers_only_takes_linear_time():
    """A pattern that starts again at each of many bytes FF would take hours."""
    assert with_end(b"\xff\xd8" + b"\xff" * 5_000_000) is None
    assert up_to_cut(b"\xff\xd8" + b"\xff" * 5_000_000) is None


def test_lack_of_memory_while_completing_is_not_an_image_error(monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise ValueError("Insufficient memory (case 4)")

    monkeypatch.setattr("simplejpeg.decode_jpeg", fail)
    with pytest.raises(MemoryError):
        with_end(JPEGS["4:2:0"][:-2])
