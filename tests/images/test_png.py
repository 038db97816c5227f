"""PNGs that Pillow refuses for a chunk that viewers ignore."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import pyvips
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from imagevec import ImageError
from imagevec.images.png import without_ancillary_chunks
from tests.helpers.images import MODES_OF_FORMAT, encode, of_mode, opened, photo
from tests.helpers.judges import by_imagemagick, by_vips, needs_imagemagick
from tests.helpers.pipeline import decoded, series, small_row

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112
MEGABYTES_2 = zlib.compress(bytes(2 << 20))
NEARLY_1_MB = zlib.compress(bytes((1 << 20) - 1))

pytestmark = pytest.mark.filterwarnings("ignore:Invalid APNG:UserWarning")


def chunk(kind: bytes, content: bytes, *, intact: bool = True) -> bytes:
    checksum = zlib.crc32(kind + content) ^ (not intact)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def chunks(png: bytes) -> list[bytes]:
    """Splits a file into its chunks."""
    start, parts = len(SIGNATURE), []
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        parts.append(png[start:end])
        start = end
    return parts


def with_chunks(png: bytes, *more: bytes, before: bytes = b"IDAT") -> bytes:
    """Inserts chunks before the first one of a kind."""
    parts = chunks(png)
    position = next(number for number, part in enumerate(parts) if part[4:8] == before)
    return SIGNATURE + b"".join([*parts[:position], *more, *parts[position:]])


def frame(sequence: int, width: int = 40) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, width, 30, 0, 0, 1, 1, 0, 0))


def refused(data: bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    return error.value


def is_refused_by_pillow(data: bytes) -> bool:
    try:
        opened(data).load()
    except Exception:
        return True
    return False


def oriented(value: int) -> bytes:
    """The content of an eXIf chunk."""
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes().removeprefix(b"Exif\0\0")


PNG = encode(photo(40, 30))
BAD = chunk(b"tEXt", b"Comment\0wrong", intact=False)
BLACK = encode(Image.new("RGB", (40, 30)))
ANIMATION = chunk(b"acTL", struct.pack(">II", 2, 0))

LENGTHS = {b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"acTL": 8, b"tRNS": 6, b"fcTL": 26}
CHECKED = [
    *LENGTHS,
    b"sRGB",
    b"iCCP",
    b"eXIf",
    b"tIME",
    b"bKGD",
    b"sBIT",
    b"tEXt",
    b"zTXt",
    b"iTXt",
]
CHECKED += [b"sPLT", b"hIST", b"cICP", b"fdAT", b"prVt", b"puBl", b"caNV"]

REFUSED = {
    **{
        f"{kind.decode()} with a wrong checksum": with_chunks(
            PNG, chunk(kind, bytes(7), intact=False)
        )
        for kind in CHECKED
    },
    **{
        f"{kind.decode()} that is too short": with_chunks(PNG, chunk(kind, bytes(length - 1)))
        for kind, length in LENGTHS.items()
    },
    **{
        f"{kind.decode()} without content after the pixels": with_chunks(
            PNG, chunk(kind, b""), before=b"IEND"
        )
        for kind in LENGTHS
    },
    "sRGB without content": with_chunks(PNG, chunk(b"sRGB", b"")),
    "iCCP without content": with_chunks(PNG, chunk(b"iCCP", b"")),
    "iCCP of an unknown compression": with_chunks(PNG, chunk(b"iCCP", b"sRGB\0\7content")),
    "iCCP of 2 MB": with_chunks(PNG, chunk(b"iCCP", b"sRGB\0\0" + MEGABYTES_2)),
    "zTXt of 2 MB": with_chunks(PNG, chunk(b"zTXt", b"a\0\0" + MEGABYTES_2)),
    "iTXt of 2 MB": with_chunks(PNG, chunk(b"iTXt", b"a\0\1\0\0\0" + MEGABYTES_2)),
    "zTXt of 2 MB after the pixels": with_chunks(
        PNG, chunk(b"zTXt", b"a\0\0" + MEGABYTES_2), before=b"IEND"
    ),
    "65 texts of 1 MB": with_chunks(PNG, *[chunk(b"zTXt", b"a\0\0" + NEARLY_1_MB)] * 65),
    "zTXt of an unknown compression": with_chunks(PNG, chunk(b"zTXt", b"a\0\7content")),
    "frames out of sequence": with_chunks(PNG, ANIMATION, frame(5)),
    "a frame that is too wide": with_chunks(PNG, ANIMATION, frame(0, width=41)),
    "fdAT without a number": with_chunks(
        with_chunks(PNG, ANIMATION, frame(0)), chunk(b"fdAT", b"\0"), before=b"IEND"
    ),
    "a wrong checksum, and bytes after IEND": with_chunks(PNG, BAD) + b"garbage",
    "a wrong checksum, and no IEND": with_chunks(PNG, BAD)[:-12],
    "a text that is cut after the pixels": with_chunks(
        PNG, chunk(b"tEXt", bytes(90)), before=b"IEND"
    )[:-40],
    "two of everything": with_chunks(PNG, *[BAD, chunk(b"pHYs", b""), frame(3)] * 2),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_chunk_that_viewers_ignore_is_ignored(kind):
    data = REFUSED[kind]
    assert is_refused_by_pillow(data)
    image = decoded(data)
    assert np.array_equal(image.pixels, decoded(PNG).pixels)
    assert not image.truncated


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if "cut" not in kind])
def test_libvips_ignores_the_same_chunks(kind):
    assert np.array_equal(by_vips(REFUSED[kind]), decoded(PNG).pixels)


# ImageMagick fails where the file has no end.
@needs_imagemagick
@pytest.mark.parametrize("kind", [k for k in REFUSED if "cut" not in k and "no IEND" not in k][::4])
def test_imagemagick_ignores_the_same_chunks(kind):
    assert np.array_equal(by_imagemagick(REFUSED[kind], "png", "black"), decoded(PNG).pixels)


def test_chunk_is_ignored_in_the_stream_too():
    row = small_row(REFUSED["zTXt of 2 MB"], batch_size=1)
    expected = small_row(PNG)
    assert row["error"] is None
    assert (row["width"], row["height"], row["truncated"]) == (40, 30, False)
    assert np.array_equal(row["features"], expected["features"])


def saved_by_vips(image: Image.Image, **options: object) -> bytes:
    return bytes(pyvips.Image.new_from_array(np.asarray(image)).pngsave_buffer(**options))


LAYOUTS = {
    **{f"mode {mode}": encode(of_mode(mode, 40, 30)) for mode in MODES_OF_FORMAT["PNG"]},
    **{f"palette of {2**bits}": encode(of_mode("P", 40, 30), bits=bits) for bits in (1, 2, 4)},
    "grey of 4 bits": saved_by_vips(of_mode("L", 40, 30), bitdepth=4),
    "RGB of 16 bits": saved_by_vips(photo(40, 30), bitdepth=16),
    "interlaced": saved_by_vips(photo(40, 30), interlace=True),
    "interlaced grey": saved_by_vips(of_mode("L", 40, 30), interlace=True),
    "interlaced palette": saved_by_vips(photo(40, 30), interlace=True, palette=True),
    "several IDAT": with_chunks(PNG, chunk(b"IDAT", b""), chunk(b"IDAT", b"")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repaired_file_of_any_layout_equals_the_intact_one(layout):
    data = with_chunks(LAYOUTS[layout], BAD, before=b"IDAT")
    assert is_refused_by_pillow(data)
    assert np.array_equal(decoded(data).pixels, decoded(LAYOUTS[layout]).pixels)


@given(
    st.lists(
        st.builds(
            chunk,
            st.sampled_from([*CHECKED, b"zzzz", b"aAaA"]),
            st.binary(max_size=40),
            intact=st.booleans(),
        ),
        max_size=6,
    ),
    st.sampled_from([b"IDAT", b"IEND"]),
)
def test_no_ancillary_chunk_changes_the_pixels(more, before):
    data = with_chunks(PNG, *more, before=before)
    assert np.array_equal(decoded(data).pixels, decoded(PNG).pixels)


def test_intact_png_is_decoded_once(monkeypatch):
    def fail(data: bytes) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("imagevec.images.damaged.without_ancillary_chunks", fail)
    assert decoded(with_chunks(PNG, chunk(b"tEXt", b"Comment\0fine"))).width == 40


def test_nothing_is_tried_again_if_nothing_can_be_left_out():
    assert list(without_ancillary_chunks(PNG)) == []
    assert list(without_ancillary_chunks(with_chunks(PNG, chunk(b"eXIf", oriented(6))))) == []


def test_memory_for_a_file_of_many_small_chunks_is_bounded():
    """A list of chunks would be twenty times as large as such a file."""
    data = with_chunks(encode(photo(40, 30)), chunk(b"aaAa", b"", intact=False) * 1_000_000)
    tracemalloc.start()
    assert refused(data).code == "corrupt"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(data)


def xmp(value: int) -> bytes:
    return b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="%d"/>' % value


def raw_profile(value: int) -> bytes:
    """The text in which ImageMagick stores EXIF."""
    content = b"Exif\0\0" + oriented(value)
    return b"Raw profile type exif\0\nexif\n%8d\n" % len(content) + content.hex().encode()


@pytest.mark.parametrize(
    "orientation",
    [
        chunk(b"eXIf", oriented(6)),
        chunk(b"iTXt", xmp(6)),
        chunk(b"tEXt", raw_profile(6)),
        chunk(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(6).split(b"\0", 1)[1])
        ),
    ],
    ids=["eXIf", "XMP", "tEXt", "zTXt"],
)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_orientation_is_kept(orientation, before):
    intact = with_chunks(PNG, orientation, before=before)
    assert decoded(intact).pixels.shape == (40, 30, 3)
    assert np.array_equal(decoded(with_chunks(intact, BAD)).pixels, decoded(intact).pixels)


def test_orientation_with_a_wrong_checksum_does_not_count():
    data = with_chunks(PNG, chunk(b"eXIf", oriented(6), intact=False))
    assert np.array_equal(decoded(data).pixels, decoded(PNG).pixels)


def test_orientation_in_a_text_that_is_too_large_does_not_count():
    content = zlib.compress(b'<x tiff:Orientation="6"/>' + bytes(2 << 20))
    data = with_chunks(PNG, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + content))
    assert np.array_equal(decoded(data).pixels, decoded(PNG).pixels)
    with_exif = with_chunks(data, chunk(b"eXIf", oriented(6)))
    assert decoded(with_exif).pixels.shape == (40, 30, 3)


TRANSPARENT = {
    "RGB": (photo(40, 30), bytes([0, 9] * 3)),
    "L": (of_mode("L", 40, 30), bytes([0, 100])),
    "P": (of_mode("P", 40, 30), bytes(range(0, 250, 2))),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_is_kept(mode):
    image, content = TRANSPARENT[mode]
    pixels = np.array(image)
    pixels[:15] = 9 if mode == "RGB" else 100
    opaque = Image.fromarray(pixels)
    if mode == "P":
        opaque.putpalette(image.getpalette() or [])
    intact = with_chunks(encode(opaque), chunk(b"tRNS", content))
    data = with_chunks(intact, BAD)
    expected = decoded(intact, background="#00ff00").pixels
    assert not np.array_equal(expected, decoded(encode(opaque)).pixels)
    assert np.array_equal(decoded(data, background="#00ff00").pixels, expected)


IGNORED_TRANSPARENCY = {
    "wrong checksum": with_chunks(BLACK, chunk(b"tRNS", bytes(6), intact=False)),
    "too short": with_chunks(BLACK, chunk(b"tRNS", bytes(5))),
    "empty": with_chunks(BLACK, chunk(b"tRNS", b"")),
    "after the pixels": with_chunks(
        with_chunks(BLACK, BAD), chunk(b"tRNS", bytes(6)), before=b"IEND"
    ),
}


@pytest.mark.parametrize("kind", IGNORED_TRANSPARENCY)
def test_transparency_that_is_not_valid_is_ignored(kind):
    image = decoded(IGNORED_TRANSPARENCY[kind], background="white")
    assert np.array_equal(image.pixels, decoded(BLACK).pixels)


@needs_imagemagick
@pytest.mark.parametrize("kind", IGNORED_TRANSPARENCY)
def test_imagemagick_ignores_the_same_transparency(kind):
    pixels = by_imagemagick(IGNORED_TRANSPARENCY[kind], "png", "white")
    assert np.array_equal(pixels, decoded(BLACK).pixels)


def test_significant_bits_are_kept():
    samples = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    intact = with_chunks(encode(Image.fromarray(samples)), chunk(b"sBIT", bytes([12])))
    data = with_chunks(intact, BAD)
    assert decoded(intact).pixels.max() > 60  # of 12 bits, not of 16
    assert np.array_equal(decoded(data).pixels, decoded(intact).pixels)


HEADER, *_, END = chunks(PNG)
PIXELS = b"".join(part[8:-4] for part in chunks(PNG) if part[4:8] == b"IDAT")
PALETTE_PNG = encode(of_mode("P", 40, 30))


def png_of(*parts: bytes) -> bytes:
    return SIGNATURE + b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [
        png_of(chunk(b"IHDR", HEADER[8:-4], intact=False), chunk(b"IDAT", PIXELS), END),
        PALETTE_PNG.replace(
            chunks(PALETTE_PNG)[1], chunk(b"PLTE", chunks(PALETTE_PNG)[1][8:-4], intact=False)
        ),
        with_chunks(PNG, chunk(b"QQQQ", b"", intact=False)),
        with_chunks(PNG, b"\1\2\3\4"),
        with_chunks(PNG, (struct.pack(">I", 20) + chunk(b"zzZz", bytes(9))[4:])),
    ],
    ids=["IHDR", "PLTE", "unknown critical chunk", "bytes between chunks", "wrong length"],
)
def test_broken_structure_is_corrupt(data):
    assert refused(data).code == "corrupt"
    header_end = len(SIGNATURE) + len(HEADER)
    assert refused(data[:header_end] + BAD + data[header_end:]).code == "corrupt"


@pytest.mark.parametrize("more", [(), (BAD,)], ids=["only", "with a bad text"])
def test_checksum_of_the_pixels_is_that_of_zlib(more):
    """Pillow does not read the checksum of IDAT. That of zlib is of the pixels themselves."""
    wrong = png_of(HEADER, *more, chunk(b"IDAT", PIXELS, intact=False), END)
    assert np.array_equal(decoded(wrong).pixels, decoded(PNG).pixels)
    assert refused(png_of(HEADER, *more, chunk(b"IDAT", PIXELS[:-4] + bytes(4)), END)).code == (
        "corrupt"
    )


def test_changed_pixels_are_corrupt():
    stored = zlib.compress(zlib.decompress(PIXELS), level=0)
    for position in range(20, len(stored) - 10, 400):
        changed = bytearray(stored)
        changed[position] ^= 1
        for more in ((), (BAD,)):
            assert refused(png_of(HEADER, *more, chunk(b"IDAT", bytes(changed)), END)).code == (
                "corrupt"
            )


def test_pixel_limit_holds_for_the_second_try(monkeypatch):
    data = REFUSED["zTXt of 2 MB"]
    assert decoded(data, max_pixels=1200).width == 40

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert refused(data, max_pixels=1199).code == "too_large"


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_lack_of_memory_in_the_second_try_is_not_an_image_error(error, monkeypatch):
    def load(image: Image.Image) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(type(error)):
        decoded(with_chunks(PNG, BAD))


def test_truncated_pixels_are_truncated_whatever_the_chunks():
    for more in ((), (BAD,), (chunk(b"pHYs", b""),)):
        data = with_chunks(PNG, *more)
        start = data.index(b"IDAT")
        for length in range(start + 4, len(data) - 40, 100):
            assert refused(data[:length]).code == "truncated"


def test_text_that_is_cut_before_the_pixels_is_truncated():
    data = with_chunks(PNG, chunk(b"tEXt", bytes(90)))
    assert refused(data[: data.index(b"IDAT") - 50]).code == "truncated"


def test_limits_of_pillow_are_not_raised():
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    for kind in itertools.islice(REFUSED, 30):
        decoded(REFUSED[kind])
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_rows_keep_their_order_among_repaired_files():
    files = [PNG, REFUSED["iCCP of 2 MB"], b"", REFUSED["frames out of sequence"], PNG]
    codes = [small_row(file)["error"] for file in series(files)]
    assert [error is None for error in codes] == [True, True, False, True, True]
