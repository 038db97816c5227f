"""The table of formats, and the words for files of formats and layouts that are not decoded."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from PIL import Image

from imagevec import ImageError
from imagevec.images.formats import HEAD_BYTES, TABLE, identify, is_accepted
from imagevec.images.reading import read
from imagevec.options import FORMATS, OTHER_FORMATS
from imagevec.table.webdataset import IMAGE_EXTENSIONS
from tests.helpers.fuzz import MUTATIONS
from tests.helpers.images import encode, of_mode, opened, photo, png_header
from tests.helpers.pipeline import decoded, run_python
from tests.helpers.tiff import tiff as write_tiff

ALL = (*FORMATS, *OTHER_FORMATS)
ROOT = Path(__file__).parents[2]

RAW_HINT = "the raw data of a camera: convert it first"
SVG_HINT = "SVG, a vector image: convert it first"


def refused(data: bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as error:
        decoded(data, **options)
    return error.value


def box(kind: bytes, content: bytes = b"") -> bytes:
    """Returns a box of ISO media (ISO/IEC 14496-12, section 4.2)."""
    return struct.pack(">I", 8 + len(content)) + kind + content


def iso(major: bytes, *compatible: bytes) -> bytes:
    return box(b"ftyp", major + bytes(4) + b"".join(compatible)) + box(b"mdat", bytes(64))


def tiff(tags: dict[int, int | tuple[int, ...] | bytes], order: Literal["<", ">"] = "<") -> bytes:
    """Returns a grey TIFF of 8x8 pixels in which some tags differ."""
    grey = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 278: 8}
    typed: dict[int, tuple[str, Sequence[int]]] = {}
    for tag, value in {**grey, **tags}.items():
        code = "B" if isinstance(value, bytes) else "H"
        typed[tag] = (code, (value,) if isinstance(value, int) else value)
    return write_tiff(typed, [bytes(range(64))], order)


def jpeg(frame: int, bits: int = 8, components: int = 1) -> bytes:
    """Returns a grey JPEG of 8x8 pixels in one block, or a header (T.81, annex B)."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    numbers = range(1, components + 1)
    table = bytes([1] + 15 * [0]) + b"\0"  # one code, for the category 0
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes(64 * [1]))
        + segment(
            frame,
            struct.pack(">BHHB", bits, 8, 8, components)
            + b"".join(bytes([number, 0x11, 0]) for number in numbers),
        )
        + segment(0xC4, b"\x00" + table)
        + segment(0xC4, b"\x10" + table)
        + segment(
            0xDA,
            bytes([components])
            + b"".join(bytes([number, 0]) for number in numbers)
            + bytes([0, 63, 0]),
        )
        + b"\x3f\xff\xd9"
    )


def bmp(bits: int, compression: int, header: int = 40, masks: tuple[int, ...] = ()) -> bytes:
    fields = struct.pack("<IiiHHIIiiII", header, 8, 8, 1, bits, compression, 64, 0, 0, 0, 0)
    info = (fields + bytes(header))[:header] + struct.pack(f"<{len(masks)}I", *masks)
    return (
        b"BM" + struct.pack("<IHHI", 14 + len(info) + 512, 0, 0, 14 + len(info)) + info + bytes(512)
    )


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(9))
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
PROLOG = b'<?xml version="1.0"?>\n<!-- made by hand, <svg> or not -->\n'
DOCTYPE = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "a.dtd" [<!ENTITY a "b">]>\n'

NAMED = {
    "JPEG XL": (b"\xff\x0a\xfa\x1f" + bytes(60), "JPEG XL, convert it first"),
    "JPEG XL boxes": (
        box(b"JXL ", b"\r\n\x87\n") + box(b"ftyp", b"jxl " + bytes(4) + b"jxl "),
        "JPEG XL, convert it first",
    ),
    "JPEG 2000": (
        encode(photo(), "JPEG2000"),
        "JPEG2000, which is accepted if the option formats names it",
    ),
    "JPEG 2000 codestream": (
        encode(photo(), "JPEG2000", no_jp2=True),
        "JPEG2000, which is accepted if the option formats names it",
    ),
    "ICO": (encode(photo(), "ICO"), "ICO, which is accepted if the option formats names it"),
    "TGA": (encode(photo(), "TGA"), "TGA"),
    "TGA, grey and run lengths": (encode(photo().convert("L"), "TGA", rle=True), "TGA"),
    "CUR": (b"\0\0\2\0" + encode(photo(), "ICO")[4:], "CUR"),
    "ANI": (b"RIFF" + struct.pack("<I", 40) + b"ACON" + bytes(36), "ANI"),
    "ICNS": (encode(photo(), "ICNS"), "ICNS"),
    "HEIF of AVC": (iso(b"avci", b"mif1", b"avci"), "HEIF of another codec than HEVC"),
    "CR3": (iso(b"crx ", b"isom"), f"CR3, {RAW_HINT}"),
    "MP4": (iso(b"isom", b"isom", b"iso2", b"avc1", b"mp41"), "MP4 video"),
    "3GP": (iso(b"3gp4", b"isom"), "MP4 video"),
    "MP4 with an unknown brand": (iso(b"abcd", b"efgh", b"mp42"), "MP4 video"),
    "M4A": (iso(b"M4A ", b"isom", b"mp42"), "MPEG-4 audio"),
    "MOV": (iso(b"qt  ", b"qt  "), "QuickTime video"),
    "MOV of old": (box(b"wide") + box(b"mdat", bytes(64)), "QuickTime video without a brand"),
    "ISO media": (iso(b"abcd", b"efgh"), "ISO media of brand b'abcd'"),
    "WebM": (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" + bytes(60), "WebM or Matroska video"),
    "AVI": (b"RIFF" + struct.pack("<I", 100) + b"AVI LIST" + bytes(88), "AVI"),
    "WAV": (b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + bytes(88), "WAV"),
    "PSD": (b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(60), "PSD"),
    "CR2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(60), f"CR2, {RAW_HINT}"),
    "DNG": (tiff({254: 1, 330: 8, 50706: bytes([1, 4, 0, 0])}), f"DNG, {RAW_HINT}"),
    "DNG of linear data": (tiff({50706: bytes([1, 4, 0, 0])}, ">"), f"DNG, {RAW_HINT}"),
    "NEF": (tiff({254: 1, 271: b"NIKON CORPORATION\0", 330: 8}, ">"), f"NEF, {RAW_HINT}"),
    "ARW": (tiff({254: 1, 271: b"SONY\0", 330: (8, 9)}), f"ARW, {RAW_HINT}"),
    "SRW": (tiff({254: 1, 271: b"SAMSUNG\0", 330: 8}), f"RAW, {RAW_HINT}"),
    "PEF": (tiff({262: 32803, 271: b"PENTAX\0"}), f"RAW, {RAW_HINT}"),
    "ORF": (b"IIRO\x08\0\0\0" + bytes(60), f"ORF, {RAW_HINT}"),
    "RW2": (b"IIU\0\x18\0\0\0" + bytes(60), f"RW2, {RAW_HINT}"),
    "RAF": (b"FUJIFILMCCD-RAW 0201FF389501" + bytes(60), f"RAF, {RAW_HINT}"),
    "PDF": (encode(photo(), "PDF"), "PDF"),
    "EPS": (encode(photo(), "EPS"), "PostScript"),
    "EPS with a preview": (b"\xc5\xd0\xd3\xc6\x1e\0\0\0" + bytes(60), "PostScript"),
    "SVG": (SVG, SVG_HINT),
    "SVG with a byte order mark": (b"\xef\xbb\xbf" + SVG, SVG_HINT),
    "SVG in UTF-16": (SVG.decode().encode("utf-16"), SVG_HINT),
    "SVG in UTF-16 without a mark": (SVG.decode().encode("utf-16-be"), SVG_HINT),
    "SVG in Latin-1": (b"<!-- M\xfcller -->" + SVG, SVG_HINT),
    "SVG with a prolog": (PROLOG + SVG, SVG_HINT),
    "SVG with a document type": (PROLOG + DOCTYPE + SVG, SVG_HINT),
    "SVG with a long comment": (b"<!--" + 500 * b"- x" + b"-->" + SVG, SVG_HINT),
    "SVG with a comment of 10 KB": (b"<!--" + 5000 * b"-x" + b"-->" + SVG, "XML"),
    "SVG with a namespace": (b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'/>", SVG_HINT),
    "SVGZ": (gzip.compress(PROLOG + SVG), "gzip-compressed SVG"),
    "HTML": (
        b"\n<!DOCTYPE html><html><title>404</title>",
        "HTML, often an error page that was saved as an image",
    ),
    "HTML in Latin-1": (
        b"<html><title>P\xe1gina no encontrada</title>",
        "HTML, often an error page that was saved as an image",
    ),
    "HTML of old": (b"<HTML><HEAD>", "HTML, often an error page that was saved as an image"),
    "XML": (PROLOG + b"<Error><Code>AccessDenied</Code></Error>", "XML"),
    "JSON": (json.dumps({"error": "not found"}).encode(), "JSON"),
    "text with a word of MOV": (b"The free image is gone", "starts with b'The free', plain text"),
    "plain text": ("no image, façade".encode(), "starts with b'no image', plain text"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "Git LFS pointer, run git lfs pull to get the file that it stands for",
    ),
    "gzip": (gzip.compress(tarred()), "gzip"),
    "zip": (zipped(), "zip"),
    "tar": (tarred(), "tar"),
    "NumPy": (array(), "NumPy"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
    "FITS": (b"SIMPLE  =                    T".ljust(80) + bytes(60), "FITS"),
    "DICOM": (bytes(128) + b"DICM" + bytes(60), "DICOM"),
    "DDS": (encode(photo(), "DDS"), "DDS"),
    "KTX": (b"\xabKTX 11\xbb\r\n\x1a\n\1\2\3\4" + bytes(60), "KTX"),
    "KTX 2": (b"\xabKTX 20\xbb\r\n\x1a\n" + bytes(60), "KTX"),
    "EXR": (b"v/1\1\2\0\0\0channels\0" + bytes(60), "OpenEXR"),
    "HDR": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4), "Radiance HDR"),
    "PPM": (encode(photo(), "PPM"), "Netpbm"),
    "PGM": (b"P2\n1 1\n255\n9\n", "Netpbm"),
    "QOI": (encode(photo(), "QOI"), "QOI"),
    "PCX": (encode(photo(), "PCX"), "PCX"),
    "SGI": (encode(photo(), "SGI"), "SGI"),
    "BPG": (b"BPG\xfb\x20\0" + bytes(60), "BPG"),
    "FLIF": (b"FLIF31" + bytes(60), "FLIF"),
    "WMF": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(60), "WMF"),
    "EMF": (b"\1\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF" + bytes(60), "EMF"),
    "CgBI": (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 4) + b"CgBI\x50\0\x20\x06" + bytes(60),
        "CgBI, a PNG for Apple's devices only",
    ),
    "unknown": (b"\0\1\2\3\4\5\6\7\x08", r"starts with b'\x00\x01\x02\x03\x04\x05\x06\x07'"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_files_of_other_formats_are_named(kind, tmp_path):
    data, words = NAMED[kind]
    error = refused(data)
    assert error.code == "unsupported_format"
    assert error.detail == words
    (tmp_path / "image.jpg").write_bytes(data)
    with pytest.raises(ImageError) as by_path:
        read(str(tmp_path / "image.jpg"))
        raise error  # a TIFF is read completely before its tags are
    assert str(by_path.value) == str(error)


@pytest.mark.parametrize("kind", NAMED)
def test_the_head_of_a_file_that_is_not_decoded_is_refused(kind):
    data, _ = NAMED[kind]
    is_tiff = data[:4] in (b"II*\0", b"MM\0*") and kind != "CR2"
    assert is_accepted(data[:HEAD_BYTES], FORMATS) is is_tiff


def numpy_tiff(shape: tuple[int, ...], dtype: str, photometric: str, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones(shape, dtype), photometric=photometric, **options)
    return file.getvalue()


LAYOUTS = {
    "5 x 16 bit": (
        numpy_tiff((8, 8, 5), "u2", "rgb", planarconfig="contig"),
        "TIFF, 5 x 16 bit RGB",
    ),
    "10 bands": (
        numpy_tiff((8, 8, 10), "u1", "minisblack", planarconfig="contig"),
        "TIFF, 10 x 8 bit grey",
    ),
    "32-bit RGB": (numpy_tiff((8, 8, 3), "u4", "rgb"), "TIFF, 3 x 32 bit RGB"),
    "float RGB": (numpy_tiff((8, 8, 3), "f4", "rgb"), "TIFF, 3 x 32 bit float RGB"),
    "half": (numpy_tiff((8, 8), "f2", "minisblack"), "TIFF, 1 x 16 bit float grey"),
    "double": (numpy_tiff((8, 8), "f8", "minisblack"), "TIFF, 1 x 64 bit float grey"),
    "complex": (numpy_tiff((8, 8), "c16", "minisblack"), "TIFF, 1 x 128 bit complex float grey"),
    "BigTIFF": (
        numpy_tiff((8, 8, 5), "u2", "rgb", planarconfig="contig", bigtiff=True, byteorder=">"),
        "TIFF, 5 x 16 bit RGB",
    ),
    "different depths": (
        tiff({258: (5, 6, 5), 262: 2, 277: 3}),
        "TIFF, 3 x 5/6/5 bit RGB",
    ),
    "3 bits": (tiff({258: 3}), "TIFF, 1 x 3 bit grey"),
    "LogLuv": (tiff({259: 34676, 262: 32845, 277: 3}), "TIFF, LogLuv compression"),
    "another meaning": (tiff({262: 51177}), "TIFF, 1 x 8 bit photometric interpretation 51177"),
    "JPEG 2000 in a TIFF": (tiff({259: 34712}), "TIFF, JPEG 2000 compression"),
    "Aperio's JPEG 2000": (tiff({259: 33005}), "TIFF, JPEG 2000 compression"),
    "JPEG XL in a TIFF": (tiff({259: 50002}), "TIFF, JPEG XL compression"),
    "LERC": (tiff({259: 34887}, ">"), "TIFF, LERC compression"),
    "JBIG": (tiff({259: 34661}), "TIFF, JBIG compression"),
    "WebP in a TIFF": (tiff({259: 50001}), "TIFF, WebP compression"),
    "12-bit JPEG": (jpeg(0xC1, bits=12), "12-bit JPEG"),
    "12-bit progressive JPEG": (jpeg(0xC2, bits=12), "12-bit JPEG"),
    "16-bit lossless JPEG": (jpeg(0xC3, bits=16), "16-bit lossless JPEG"),
    "hierarchical JPEG": (jpeg(0xC5), "hierarchical JPEG"),
    "lossless arithmetic JPEG": (jpeg(0xCB), "lossless JPEG with arithmetic coding"),
    "JPEG-LS": (jpeg(0xF7), "JPEG-LS"),
    "JPEG of 2 components": (jpeg(0xC0, components=2), "JPEG, 2 components"),
    "JPEG in a BMP": (bmp(0, 4), "BMP, a JPEG inside"),
    "PNG in a BMP": (bmp(0, 5), "BMP, a PNG inside"),
    "64-bit BMP": (bmp(64, 0), "BMP, 64 bit"),
    "2-bit BMP": (bmp(2, 0), "BMP, 2 bit"),
    "BMP of 4 bits a channel": (
        bmp(16, 3, masks=(0xF00, 0xF0, 0xF)),
        "BMP, 16 bit with other masks than usual",
    ),
    "OS/2 RLE24": (bmp(24, 4, header=64), "BMP, RLE24"),
    "OS/2 Huffman": (bmp(1, 3, header=64), "BMP, Huffman coding"),
    "OS/2, short header": (bmp(24, 0, header=16), "BMP, header of 16 bytes"),
    "OS/2 bitmap array": (b"BA" + bytes(12) + bmp(24, 0), "OS/2 bitmap array"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_that_is_not_decoded_is_named(kind):
    data, words = LAYOUTS[kind]
    error = refused(data)
    assert (error.code, error.detail) == ("unsupported_format", words)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(0xC0),
        jpeg(0xC1),
        jpeg(0xC9),
        tiff({}),
        tiff({}, ">"),
        tiff({254: 1}),
        tiff({330: 8}),
        tiff({254: 2, 330: 8}),
        bmp(24, 0),
        bmp(24, 0, header=64),
        bmp(16, 3, masks=(0xF800, 0x7E0, 0x1F)),
    ],
)
def test_the_same_files_in_a_usual_layout_are_decoded(data):
    assert decoded(data).pixels.shape == (8, 8, 3)


@pytest.mark.parametrize(
    "data",
    [
        tiff({256: 0}),
        tiff({258: 0}),
        tiff({262: 3}),  # no palette
        b"II*\0\x08\0\0\0\1\0" + bytes(16),
        bmp(24, 9),
        bmp(7, 0),
        bmp(24, 0, header=41),
        jpeg(0xC1, bits=77),
        jpeg(0xC0, components=0),
        b"\x89PNG\r\n\x1a\n" + bytes(60),
        b"GIF89a" + bytes(60),
    ],
)
def test_a_broken_header_is_corrupt(data):
    assert refused(data).code == "corrupt"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_file_cut_anywhere_after_its_signature_is_truncated(format):
    data = encode(photo(40, 30), format)
    for length in range(HEAD_BYTES, len(data) - 20, 1 + len(data) // 40):
        error = refused(data[:length])
        assert error.code == "truncated", (length, error)


@pytest.mark.parametrize("values", ["colours", "JPEG tables"])
def test_a_tiff_cut_within_the_values_of_its_tags_is_truncated(values):
    image = of_mode("P" if values == "colours" else "RGB", 40, 30)
    data = encode(image, "TIFF", compression="tiff_lzw" if values == "colours" else "jpeg")
    directory = int.from_bytes(data[4:8], "little")
    for length in range(directory + 150, len(data), 61):
        assert refused(data[:length]).code == "truncated", length


@pytest.mark.parametrize("inside", ["png", "bmp"])
def test_a_cut_icon_is_truncated(inside):
    data = encode(photo(64, 64), "ICO", bitmap_format=inside)
    for length in range(HEAD_BYTES, len(data) * 3 // 4, 1 + len(data) // 20):
        assert refused(data[:length], formats=OTHER_FORMATS).code == "truncated", length


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}], ids=str)
def test_a_cut_jpeg_2000_is_truncated(options):
    data = encode(photo(40, 30), "JPEG2000", **options)
    for length in range(HEAD_BYTES, len(data) // 2, 37):
        assert refused(data[:length], formats=OTHER_FORMATS).code == "truncated", length


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("ICO", {})]
)
def test_other_formats_are_decoded_if_they_are_named(format, options):
    data = encode(photo(64, 64), format, **options)
    image = decoded(data, formats=(format,))
    assert np.array_equal(image.pixels, np.asarray(opened(data).convert("RGB")))
    assert refused(data, formats=(format,), max_pixels=64 * 64 - 1).code == "too_large"
    assert is_accepted(data[:HEAD_BYTES], (format,))


@pytest.mark.parametrize("inside", ["png", "bmp"])
def test_the_image_of_an_icon_is_checked_before_it_is_decoded(inside):
    data = bytearray(encode(photo(64, 64), "ICO", bitmap_format=inside))
    assert decoded(bytes(data), formats=("ICO",)).pixels.shape == (64, 64, 3)
    start = int.from_bytes(data[18:22], "little")
    if inside == "png":
        data[start : start + 33] = png_header(30_000, 30_000)[:33]
    else:
        struct.pack_into("<ii", data, start + 4, 30_000, 60_000)
    error = refused(bytes(data), formats=("ICO",))
    assert (error.code, error.detail[:13]) == ("too_large", "30000x30000 p")


def test_the_options_are_the_formats_of_the_table():
    assert {row.name for row in TABLE if row.accepted == "by default"} == set(FORMATS)
    assert {row.name for row in TABLE if row.accepted == "if named"} == set(OTHER_FORMATS)
    for row in TABLE:
        assert bool(row.decoder) == (row.accepted != "never")
        assert (row.decoder == "pi-heif") == (row.extra == "heif")


def test_the_names_suffixes_and_brands_of_the_table_are_unique():
    names = [row.name for row in TABLE]
    brands = [brand for row in TABLE for brand in row.brands]
    assert len(names) == len(set(names)) and len(brands) == len(set(brands))
    assert all(len(brand) == 4 for brand in brands)
    decoded_suffixes = [suffix for row in TABLE if row.decoder for suffix in row.suffixes]
    assert len(decoded_suffixes) == len(set(decoded_suffixes))


def test_a_signature_is_not_hidden_by_one_before_it():
    for number, row in enumerate(TABLE):
        for signature in row.signatures:
            data = bytearray(400)
            for offset, magic in signature:
                data[offset : offset + len(magic)] = magic
            assert identify(bytes(data)) == row, (number, row.name)


def test_accepted_formats_are_told_by_their_head():
    for row in TABLE:
        if row.decoder:
            ends = [offset + len(magic) for s in row.signatures for offset, magic in s]
            assert max(ends, default=12) <= HEAD_BYTES


def test_the_table_accepts_what_pillow_accepts():
    Image.init()
    rng = random.Random(0)
    starts = [bytes(magic) for row in TABLE for s in row.signatures for _, magic in s]
    boxes = [b"\0\0\0\x20ftyp" + brand for row in TABLE for brand in row.brands]
    for start in [*starts, *boxes, b"RIFF\1\0\0\0WEBPVP8 ", *(rng.randbytes(3) for _ in range(99))]:
        head = (start + rng.randbytes(32))[:32]
        for name in set(ALL) - {"HEIF"}:
            accepts = Image.OPEN[name][1]
            assert accepts is not None
            if accepts(head[:16]) is True and name != "AVIF":
                assert is_accepted(head, ALL), (head, name)


def test_webdataset_reads_members_of_the_formats_that_are_decoded():
    expected = {s[1:] for row in TABLE if row.accepted != "never" for s in row.suffixes}
    assert set(IMAGE_EXTENSIONS) == expected
    assert {"jpg", "png", "heic", "heif", "jp2", "ico"} <= expected
    page = (ROOT / "docs/extract.md").read_text()
    item = page.partition("an image extension: ")[2].partition(". A sample")[0]
    assert set(re.findall(r"`(\w+)`", item)) == expected | {"formats"}


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/options.md", "docs/command-line.md"])
def test_the_documentation_lists_the_default_formats(page):
    (line,) = [line for line in (ROOT / page).read_text().splitlines() if "WEBP" in line]
    assert f" {', '.join(FORMATS)}" in line
    assert page == "SECURITY.md" or all(name in line for name in OTHER_FORMATS)


HEADS = """
import sys
from imagevec.images.formats import is_accepted, check_format
assert is_accepted(b"\\xff\\xd8\\xff" + bytes(29), ["JPEG"])
print([name for name in sys.modules if name.startswith(("PIL", "pi_heif", "numpy"))])
"""


def test_heads_are_judged_without_a_decoder():
    assert run_python(HEADS) == "[]\n"


@pytest.mark.parametrize("brand", [b"mif1", b"miaf", b"MA1B", b"abcd"])
def test_the_major_brand_of_an_avif_may_be_another(brand):
    data = encode(photo(), "AVIF")
    other = data[:8] + brand + data[12:]
    assert np.array_equal(decoded(other).pixels, decoded(data).pixels)


def test_heif_brands_tell_hevc_from_av1():
    hevc = [iso(b"heic", b"mif1", b"heic"), iso(b"mif1", b"mif1", b"heic"), iso(b"msf1", b"hevc")]
    hevc += [iso(b"heix", b"mif1"), iso(b"mif1", b"miaf"), iso(b"abcd", b"isom", b"heic")]
    av1 = [iso(b"avif", b"mif1", b"miaf"), iso(b"mif1", b"miaf", b"avif"), iso(b"avis", b"msf1")]
    for data, name in [*((d, "HEIF") for d in hevc), *((d, "AVIF") for d in av1)]:
        assert is_accepted(data[:HEAD_BYTES], (name,))
        assert not is_accepted(data[:HEAD_BYTES], tuple(set(ALL) - {name}))


def test_damaged_files_of_every_kind_are_rows():
    images = [encode(photo(40, 30), "JPEG2000"), encode(photo(40, 30), "JPEG2000", no_jp2=True)]
    images += [encode(photo(32, 32), "ICO", bitmap_format=kind) for kind in ("png", "bmp")]
    images += [data for data, _ in [*NAMED.values(), *LAYOUTS.values()]]
    rng = random.Random(0)
    for number in range(2000):
        data = bytearray(images[number % 4] if number % 2 else rng.choice(images))
        for _ in range(rng.randint(1, 4)):
            if data:
                rng.choice(MUTATIONS)(data, rng, images)
        with warnings.catch_warnings(), contextlib.suppress(ImageError):
            warnings.simplefilter("ignore")
            decoded(bytes(data), formats=ALL, max_pixels=1_000_000)
