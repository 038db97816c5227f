"""HEIC and other HEIF files."""

from __future__ import annotations

import ast
import dataclasses
import functools
import shutil
import struct
import subprocess
import sys

import _pi_heif
import numpy as np
import pytest
from PIL import Image, ImageOps

from imagevec import ImageError, Preprocessing
from imagevec.errors import IMAGE_ERROR_CODES
from imagevec.images import reading
from imagevec.images.heif import HeifImage
from imagevec.images.isolation import isolated
from imagevec.images.prepare import prepare
from imagevec.images.values import Value
from tests.helpers.fuzz import outcomes
from tests.helpers.heif import (
    Item,
    alpha,
    box,
    clap,
    coded,
    encode_16_bits,
    grid,
    heif,
    imir,
    irot,
    ispe,
    overlay,
)
from tests.helpers.images import cosine, encode, of_mode, opened, photo
from tests.helpers.pipeline import decoded, execution_options, pixels_of, run_python

ORIENTATION = 0x0112
TILE = coded(photo(64, 48))
OTHER_TILE = coded(photo(64, 48, seed=1))


def refused(data: bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    return error.value


def code(data: bytes, **options: object) -> str:
    return refused(data, **options).code


def with_property(item: Item, *properties: bytes) -> Item:
    return dataclasses.replace(item, properties=[*item.properties, *properties])


def with_properties(*properties: bytes) -> bytes:
    return heif([with_property(TILE, *properties)])


def close(pixels: np.ndarray, expected: Image.Image | np.ndarray) -> bool:
    """Returns whether pixels are those of an image before it was compressed."""
    plain = np.asarray(expected)
    return pixels.shape == plain.shape and bool(cosine(pixels.ravel(), plain.ravel()) >= 0.999)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_in_exif_and_properties_is_applied_once(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = photo(96, 64)
    data = encode(stored, "HEIF", exif=exif.tobytes())  # writes both, as phones do
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    assert exif.tobytes() in data
    upright = Image.fromarray(decoded(encode(stored, "HEIF")).pixels)
    upright.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(upright)
    image = decoded(data)
    assert (image.width, image.height) == upright.size
    assert np.array_equal(image.pixels, pixels_of(upright))


@pytest.mark.parametrize("quarters", range(4))
def test_a_rotation_without_exif_is_applied(quarters):
    turned = np.rot90(decoded(heif([TILE])).pixels, quarters)  # to the left
    assert np.array_equal(decoded(with_properties(irot(quarters))).pixels, turned)


@pytest.mark.parametrize(("axis", "flipped"), [(0, 0), (1, 1)])
def test_a_mirror_is_applied(axis, flipped):
    expected = np.flip(decoded(heif([TILE])).pixels, flipped)
    assert np.array_equal(decoded(with_properties(imir(axis))).pixels, expected)


def test_an_orientation_only_in_exif_is_ignored_as_the_standard_says():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    block = struct.pack(">I", 6) + b"Exif\0\0" + exif.tobytes()[6:]
    data = heif([TILE, Item(b"Exif", block, [], {b"cdsc": [1]})])
    plugin = opened(data)
    assert plugin.info["exif"]
    image = decoded(data)
    assert (image.width, image.height) == plugin.size == (64, 48)
    assert np.array_equal(image.pixels, decoded(heif([TILE])).pixels)


def test_a_crop_comes_before_a_rotation():
    whole = decoded(heif([TILE])).pixels
    image = decoded(with_properties(clap(32, 16), irot(1)))
    assert (image.width, image.height) == (16, 32)
    assert np.array_equal(image.pixels, np.rot90(whole[16:32, 16:48]))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("turns", [(), (irot(1),), (imir(0), irot(2)), (irot(3), imir(1))])
def test_a_crop_to_a_small_part_is_applied(mode, turns):
    """libheif 1.23.0 refuses crops of more than 64 pixels."""
    original = of_mode(mode, 512, 384)
    properties = (clap(100, 70, -120, 33), *turns)
    items = [with_property(coded(original.convert("L" if mode == "L" else "RGB")), *properties)]
    if mode == "RGBA":
        items.append(with_property(alpha(original.getchannel("A"), of=1), *properties))
    whole = heif(
        [
            dataclasses.replace(item, properties=item.properties[: -len(properties)])
            for item in items
        ]
    )
    white = None if mode == "L" else "white"
    expected = decoded(whole, background=white).pixels[190:260, 86:186]
    for turn in turns:
        if turn[4:8] == b"irot":
            expected = np.rot90(expected, turn[8])
        else:
            expected = np.flip(expected, turn[8])
    image = decoded(heif(items), background=white)
    assert (image.height, image.width) == expected.shape[:2]
    assert np.array_equal(image.pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_odd_sizes_are_turned_with_their_colours_in_place(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = photo(81, 61)
    upright = Image.fromarray(decoded(encode(stored, "HEIF")).pixels)
    upright.getexif()[ORIENTATION] = orientation
    expected = pixels_of(ImageOps.exif_transpose(upright))
    assert np.array_equal(decoded(encode(stored, "HEIF", exif=exif.tobytes())).pixels, expected)


@pytest.mark.parametrize("crop", [clap(100, 70, 5000), clap(0, 70), box(b"clap", bytes(32))])
def test_an_impossible_crop_is_corrupt(crop):
    assert code(with_properties(crop)) == "corrupt"


# Pixels


@pytest.mark.parametrize("size", [(64, 48), (81, 61), (1, 1), (7, 3), (130, 17)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_any_size_and_mode_is_close_to_the_original(mode, size):
    original = of_mode(mode, *size)
    data = encode(original, "HEIF", quality=95, chroma=444)
    image = decoded(data)
    assert (image.width, image.height) == size
    assert close(image.pixels, pixels_of(original.convert("RGB")))
    assert np.array_equal(image.pixels, pixels_of(opened(data).convert("RGB")))


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("mode", ["L;16", "RGB;16", "RGBA;16"])
def test_more_than_8_bits_are_scaled(mode, bits):
    original = of_mode(mode.removesuffix(";16"), 80, 60)
    wide = np.asarray(original).astype(np.uint16) * 257
    data = encode_16_bits(mode, wide, bits)
    assert opened(data).info["bit_depth"] == bits
    assert close(decoded(data).pixels, pixels_of(original.convert("RGB")))


@pytest.mark.parametrize("premultiplied", [False, True])
def test_alpha_is_dropped_or_laid_over_the_background(premultiplied):
    original = of_mode("RGBA", 80, 64)
    colours, opacity = original.convert("RGB"), original.getchannel("A")
    black = Image.new("RGB", original.size)
    stored = Image.composite(colours, black, opacity) if premultiplied else colours
    main = coded(stored, quality=95, chroma=444)
    if premultiplied:
        main.references[b"prem"] = [2]
    data = heif([main, alpha(opacity, of=1, quality=95)])
    white = Image.new("RGB", original.size, "white")
    expected = pixels_of(Image.composite(colours, white, opacity))
    assert close(decoded(data, background="white").pixels, expected)
    visible = np.asarray(opacity) > 64  # colours cannot be told where all is transparent
    assert close(decoded(data).pixels[visible], pixels_of(colours)[visible])


@pytest.mark.parametrize(
    "profile",
    [
        {"matrix_coefficients": 1, "full_range_flag": 0},
        {"matrix_coefficients": 9, "color_primaries": 9, "full_range_flag": 1},
        {"matrix_coefficients": 6, "full_range_flag": 0},
    ],
    ids=str,
)
def test_colours_follow_the_profile_of_the_file(profile):
    data = encode(photo(), "HEIF", quality=95, chroma=444, **profile)
    assert close(decoded(data).pixels, pixels_of(photo()))


def test_a_grid_is_put_together():
    tiles = [decoded(heif([tile])).pixels for tile in (TILE, OTHER_TILE)]
    data = heif([TILE, OTHER_TILE, grid(120, 40, 2, [1, 2])], primary=3)
    image = decoded(data)
    assert (image.width, image.height) == (120, 40)
    assert np.array_equal(image.pixels, np.hstack(tiles)[:40, :120])


@pytest.mark.parametrize("primary", [1, 2])
def test_the_primary_image_is_taken(primary):
    data = heif([TILE, OTHER_TILE], primary)
    assert np.array_equal(
        decoded(data).pixels, decoded(heif([[TILE, OTHER_TILE][primary - 1]])).pixels
    )


def test_thumbnails_and_further_images_are_left_alone():
    small = coded(photo(32, 24, seed=3))
    small.references[b"thmb"] = [2]
    unsupported = Item(b"av01", b"?" * 50, [ispe(9999, 9999)])
    data = heif([small, TILE, unsupported], primary=2)
    assert np.array_equal(decoded(data).pixels, decoded(heif([TILE])).pixels)


@pytest.mark.skipif(shutil.which("heif-convert") is None, reason="needs heif-convert")
@pytest.mark.parametrize("properties", [(), (irot(3),), (imir(1), irot(1)), (clap(32, 16),)])
def test_pixels_are_what_another_program_shows(properties, tmp_path):
    (tmp_path / "a.heic").write_bytes(data := with_properties(*properties))
    command = ["heif-convert", str(tmp_path / "a.heic"), str(tmp_path / "a.png")]
    subprocess.run(command, check=True, capture_output=True)
    with Image.open(tmp_path / "a.png") as shown:
        assert close(decoded(data).pixels, pixels_of(shown.convert("RGB")))


# Formats


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_brands_of_hevc_are_heif(brand):
    assert decoded(heif([TILE], brands=(brand, b"mif1", b"heic"))).width == 64


def test_a_heic_named_jpg_is_decoded(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(heif([TILE]))
    assert decoded(reading.read(str(path))).width == 64
    with pytest.raises(ImageError, match="unsupported_format.*HEIF"):
        reading.read(str(path), formats=["JPEG"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (b"av01", "AV1"),
        (b"jpeg", "JPEG"),
        (b"avc1", "AVC"),
        (b"unci", "uncompressed"),
        (b"j2k1", "JPEG 2000"),
        (b"vvc1", "VVC"),
        (b"abcd", "abcd"),
    ],
)
def test_another_codec_is_named(kind, name):
    image = Item(kind, b"?" * 50, [ispe(64, 48)])
    for data in (heif([image]), heif([image, grid(64, 48, 1, [1])], primary=2)):
        error = refused(data)
        assert error.code == "unsupported_format"
        assert name in error.detail


def test_a_sequence_without_an_image_is_named():
    data = box(b"ftyp", b"hevc\0\0\0\0hevcmsf1") + box(b"moov", bytes(100))
    assert "sequence" in refused(data).detail
    assert code(data) == "unsupported_format"


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "_pi_heif", None)
    error = refused(heif([TILE]))
    assert error.code == "unsupported_format"
    assert "pip install 'imagevec[heif]' on the workers" in error.detail


def test_the_extra_is_named_where_it_is_too_old(monkeypatch):
    load = _pi_heif.load_file  # it had one argument more
    monkeypatch.setattr(_pi_heif, "load_file", lambda *arguments: load(*arguments, True))
    assert "imagevec[heif]" in refused(heif([TILE])).detail


def test_only_heif_files_import_the_decoder():
    code = f"""
import sys
from imagevec.images.decode import decode
from imagevec.options import FORMATS
from PIL import Image
def imported():
    return [name for name in ("_pi_heif", "pi_heif", "pillow_heif") if name in sys.modules]
for data in ({encode(photo(), "JPEG")!r}, {encode(photo(), "AVIF")!r}, {heif([TILE])!r}):
    decode(data, max_pixels=10_000, formats=FORMATS)
    print(imported())
Image.init()
print("HEIF" in Image.OPEN)
"""
    assert run_python(code).splitlines() == ["[]", "[]", "['_pi_heif']", "False"]


def test_a_child_process_decodes_heif():
    decode_isolated = isolated(
        functools.partial(prepare, preprocessing=Preprocessing(), options=execution_options())
    )
    good, bad = (decode_isolated(Value(data)) for data in (heif([TILE]), heif([TILE])[:-9]))
    assert (good.width, good.height) == (64, 48)
    assert bad.error is not None and bad.error.code == "truncated"


# Limits


def test_the_pixel_limit_is_that_of_the_grid_and_not_of_its_tiles():
    data = heif([TILE, OTHER_TILE, grid(120, 40, 2, [1, 2])], primary=3)
    assert decoded(data, max_pixels=4800).width == 120
    error = refused(data, max_pixels=4799)
    assert error.code == "too_large"
    assert "120x40" in error.detail


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(HeifImage, "_decoded", decode)


def resized(item: Item, width: int, height: int) -> Item:
    """Returns an image whose header says another size."""
    properties = [content for content in item.properties if content[4:8] != b"ispe"]
    return dataclasses.replace(item, properties=[ispe(width, height), *properties])


HUGE = (60_000, 60_000)


@pytest.mark.parametrize(
    "items",
    {
        "size": [resized(TILE, *HUGE)],
        "size of a crop": [resized(with_property(TILE, clap(64, 48)), *HUGE)],
        "crop": [with_property(TILE, clap(*HUGE))],
        "canvas of a grid": [resized(grid(*HUGE, 1, [2]), 64, 48), TILE],
        "canvas of an overlay": [resized(overlay(*HUGE, [2]), 64, 48), TILE],
        "tile": [grid(64, 48, 1, [2]), resized(TILE, *HUGE)],
        "alpha": [TILE, resized(alpha(photo(64, 48).convert("L"), of=1), *HUGE)],
        "alpha of a tile": [
            grid(64, 48, 1, [2]),
            TILE,
            resized(alpha(photo(64, 48).convert("L"), of=2), *HUGE),
        ],
    }.items(),
    ids=lambda case: case[0],
)
def test_a_part_that_is_too_large_is_refused_by_the_header(items, monkeypatch):
    forbid_decoding(monkeypatch)
    assert code(heif(items[1])) == "too_large"


def test_parts_that_are_used_again_and_again_are_too_large(monkeypatch):
    forbid_decoding(monkeypatch)
    levels = [overlay(64, 48, [level] * 40) for level in range(2, 8)]
    assert code(heif([*levels, TILE])) == "too_large"


@pytest.mark.parametrize(
    "items",
    [
        [grid(64, 48, 1, [1])],
        [grid(64, 48, 1, [2]), grid(64, 48, 1, [1])],
        [Item(b"iden", b"", [ispe(64, 48)], {b"dimg": [1]})],
        [grid(64, 48, 1, [9])],
        [Item(b"hvc1", TILE.data, [])],
        [Item(b"grid", b"", [ispe(64, 48)], {b"dimg": [2]}), TILE],
    ],
    ids=["itself", "cycle", "identity", "missing", "without size", "without layout"],
)
def test_impossible_structures_are_refused(items):
    assert code(heif(items)) in ("corrupt", "unsupported_format")


def test_a_header_that_says_less_than_the_coded_image_is_corrupt():
    large = coded(photo(512, 384))
    assert code(heif([resized(large, 64, 48)])) == "corrupt"


HOSTILE = """
import dataclasses, resource
from imagevec import ImageError
from tests.helpers.heif import *
from tests.helpers.images import photo
from tests.helpers.pipeline import decoded

def outcome(data):
    try:
        decoded(data)
    except ImageError as error:
        return error.code
    return "decoded"

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

tile = coded(photo(64, 48))
large = coded(photo(2000, 2000))
small_header = [ispe(64, 48) if part[4:8] == b"ispe" else part for part in large.properties]
everything = Item(b"Exif", b"", [], {b"cdsc": [1]}, extent=(0, 4 << 20))
profile = box(b"colr", b"prof" + bytes(1 << 20))
ftyp = box(b"ftyp", b"heic" * 3)
free = box(b"free", b"")
files = [
    heif([dataclasses.replace(large, properties=small_header)]),
    heif([tile, *[everything] * 900, Item(b"abcd", bytes(4 << 20))]),
    heif([dataclasses.replace(tile, properties=[*tile.properties, profile])] * 20),
    ftyp + free * 500_000,
    ftyp + full_box(b"meta", free * 500_000),
    ftyp + full_box(b"meta", full_box(b"iloc", bytes(2) + bytes([255] * 4) + bytes(9), 2)),
    ftyp + full_box(b"meta", full_box(b"iloc", bytes(2) + b"\\1\\0" + b"\\xff" * 2000)),
    ftyp + full_box(b"meta", full_box(b"iref", box(b"dimg", bytes(2) + b"\\xff" * 200_000) * 20)),
]
outcome(heif([tile]))
start = peak()
print([[outcome(data) for data in files], peak() - start])
"""


def test_hostile_structures_take_little_memory():
    outcomes, megabytes = ast.literal_eval(run_python(HOSTILE))
    assert outcomes == ["corrupt", "corrupt", "decoded", *["corrupt"] * 5]
    assert megabytes < 60


NO_THREADS = """
import os, resource
from imagevec.images.decode import decode
decode({data!r}, max_pixels=10_000, formats=("HEIF",))
if os.getuid() == 0:
    os.setuid(65534)  # the limit does not count for root
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    decode({data!r}, max_pixels=10_000, formats=("HEIF",))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits processes as Linux does")
def test_a_worker_that_cannot_start_a_thread_says_so_and_lives():
    assert "needs a thread" in run_python(NO_THREADS.format(data=heif([TILE])))


# Damage


def test_a_grid_without_its_last_tile_is_truncated():
    layout = grid(128, 48, 2, [2, 3])
    data = heif([layout, TILE, OTHER_TILE])
    assert code(data[:-1]) == "truncated"
    part = decoded(data[:-1], truncated="accept")
    assert part.truncated
    assert part.pixels.shape == (48, 128, 3)
    assert np.array_equal(part.pixels[:, :64], decoded(data).pixels[:, :64])
    assert not decoded(data, truncated="accept").truncated


def test_a_file_that_lacks_only_other_data_is_whole():
    image = decoded(heif([TILE, OTHER_TILE])[: -len(OTHER_TILE.data)])
    assert not image.truncated
    assert np.array_equal(image.pixels, decoded(heif([TILE])).pixels)


@pytest.mark.parametrize("kind", [b"Exif", b"mime"])
def test_metadata_that_are_cut_off_do_not_matter(kind):
    metadata = Item(kind, bytes(4) + b"MM\0*" + bytes(40), references={b"cdsc": [1]})
    data = heif([grid(128, 48, 2, [2, 3]), TILE, OTHER_TILE, metadata])
    whole = decoded(data)
    for cut in (1, len(metadata.data)):
        image = decoded(data[:-cut])
        assert not image.truncated
        assert np.array_equal(image.pixels, whole.pixels)
    part = data[: -len(metadata.data) - 1]
    assert code(part) == "truncated"
    image = decoded(part, truncated="accept")
    assert image.truncated
    assert np.array_equal(image.pixels[:, :64], whole.pixels[:, :64])


@pytest.mark.parametrize("data_first", [False, True])
def test_a_cut_file_is_truncated_wherever_it_is_cut(data_first):
    data = heif([grid(128, 48, 2, [2, 3]), TILE, OTHER_TILE], data_first=data_first)
    assert decoded(data).width == 128
    first, second = 24, data.index(b"meta" if data_first else b"mdat") - 4  # boxes begin here
    codes = {length: code(data[:length]) for length in range(16, len(data))}
    corrupt = [length for length in codes if codes[length] == "corrupt"]
    assert corrupt == ([first, second] if data_first else [first])  # nothing tells of a meta box
    assert set(codes.values()) == {"truncated", "corrupt"}


def test_bytes_after_the_last_box_do_not_matter():
    for rest in (b"\0", bytes(7), bytes(100), b"garbage" * 10):
        for data_first in (False, True):
            assert decoded(heif([TILE], data_first=data_first) + rest).width == 64


@pytest.mark.parametrize("tile", [0, 1])
def test_a_tile_of_zeros_is_corrupt(tile):
    tiles = [TILE, OTHER_TILE]
    tiles[tile] = dataclasses.replace(TILE, data=bytes(len(TILE.data)))
    assert code(heif([*tiles, grid(128, 48, 2, [1, 2])], primary=3)) == "corrupt"


def test_a_size_of_zero_is_corrupt_though_libheif_reports_a_lack_of_memory(monkeypatch):
    def load_file(*arguments: object) -> None:  # as it says of a damaged HEVC header
        raise RuntimeError("Memory allocation error: Invalid image size: zero width or height")

    monkeypatch.setattr(_pi_heif, "load_file", load_file)
    assert code(heif([TILE])) == "corrupt"


def test_damaged_heif_files_end_as_pixels_or_as_an_error():
    counts = outcomes(seed=0, numbers=range(300), formats=("HEIF",))
    assert counts.total() == 300
    assert set(counts) <= {"decoded", *IMAGE_ERROR_CODES}
    assert min(counts["decoded"], counts["truncated"], counts["corrupt"]) >= 20
