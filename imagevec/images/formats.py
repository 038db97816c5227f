"""The table of file formats: which are decoded, and how a file of each is recognised.

The first bytes of a file decide whether it is read at all, and the table names what is refused.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imagevec.errors import ImageError

HEAD_BYTES = 32
"""How many first bytes decide whether a file may be of an accepted format."""

NAMING_BYTES = 4096
"""How many first bytes name a refused file, such as an SVG that starts with a comment."""

Signature = tuple[tuple[int, bytes], ...]
"""Bytes and their offsets. A file matches if it has all of them."""


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: The name in the option ``formats``, which is Pillow's, and in error messages.
        suffixes: The usual ends of file names.
        signatures: A file has one of them. Formats without are recognised by their text, or by the
            tags of a TIFF.
        brands: Of ISO media (ISO/IEC 14496-12): the ``ftyp`` box has one of them.
        decoder: What decodes it, or ``""`` if it is only named.
        extra: The extra of imagevec that installs the decoder.
        accepted: Whether it is accepted by default, only if ``formats`` names it, or never.
        hint: What to do about a file that is refused.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    signatures: tuple[Signature, ...] = ()
    brands: tuple[bytes, ...] = ()
    decoder: Literal["", "Pillow", "pi-heif"] = ""
    extra: str = ""
    accepted: Literal["by default", "if named", "never"] = "never"
    hint: str = ""


def _at(offset: int, *alternatives: bytes) -> tuple[Signature, ...]:
    return tuple(((offset, magic),) for magic in alternatives)


def _start(*alternatives: bytes) -> tuple[Signature, ...]:
    return _at(0, *alternatives)


def _both(first: bytes, offset: int, second: bytes) -> tuple[Signature, ...]:
    return (((0, first), (offset, second)),)


_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # II+, MM+: BigTIFF
_RAW_HINT = "the raw data of a camera: convert it first"

TABLE = (
    # The first match counts, so that special kinds are listed first.
    Format(
        "JPEG",
        (".jpg", ".jpeg", ".jpe", ".jfif"),
        _start(b"\xff\xd8\xff"),
        decoder="Pillow",
        accepted="by default",
    ),
    Format("CgBI", (".png",), _both(_PNG, 12, b"CgBI"), hint="a PNG for Apple's devices only"),
    Format("PNG", (".png", ".apng"), _start(_PNG), decoder="Pillow", accepted="by default"),
    Format("WEBP", (".webp",), _both(b"RIFF", 8, b"WEBP"), decoder="Pillow", accepted="by default"),
    Format("GIF", (".gif",), _start(b"GIF87a", b"GIF89a"), decoder="Pillow", accepted="by default"),
    Format("BMP", (".bmp",), _start(b"BM"), decoder="Pillow", accepted="by default"),
    Format("CR2", (".cr2",), _both(b"II*\0", 8, b"CR\x02"), hint=_RAW_HINT),
    Format("IIQ", (".iiq",), _both(b"II*\0", 8, b"IIII"), hint=_RAW_HINT),
    Format("TIFF", (".tif", ".tiff"), _start(*_TIFF), decoder="Pillow", accepted="by default"),
    # ISO media, by brand. mif1 and msf1 stand for any coding: see _iso_format.
    Format(
        "AVIF",
        (".avif", ".avifs"),
        brands=(b"avif", b"avis"),
        decoder="Pillow",
        accepted="by default",
    ),
    Format(
        "HEIF",
        (".heic", ".heif", ".hif", ".heics", ".heifs"),
        brands=(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
        + (b"mif1", b"mif2", b"msf1"),
        decoder="pi-heif",
        extra="heif",
        accepted="by default",
    ),
    Format(
        "HEIF of another codec than HEVC",
        (".avci", ".heif"),
        brands=(b"avci", b"avcs", b"jpeg", b"jpgs", b"j2ki", b"j2is", b"vvic", b"vvis", b"evbi"),
    ),
    Format("CR3", (".cr3",), brands=(b"crx ",), hint=_RAW_HINT),
    Format("QuickTime video", (".mov", ".qt"), brands=(b"qt  ",)),
    Format(
        "MP4 video",
        (".mp4", ".m4v", ".3gp", ".3g2", ".f4v"),
        brands=tuple(b"isom iso2 iso3 iso4 iso5 iso6 iso7 iso8 iso9 mp41 mp42 avc1".split())
        + tuple(b"dash mmp4 MSNV NDSC XAVC 3gp4 3gp5 3gp6 3gp7 3gr6 3ge6 3gs6 3g2a".split())
        + (b"M4V ", b"M4VH", b"M4VP", b"f4v ", b"F4V "),
    ),
    Format("MPEG-4 audio", (".m4a", ".m4b"), brands=(b"M4A ", b"M4B ", b"M4P ", b"F4A ")),
    Format(
        "QuickTime video without a brand",
        (".mov",),
        # The others are small, so their size begins with 0. That tells them from words of a text.
        _at(4, b"moov", b"mdat")
        + tuple(((0, b"\0"), (4, kind)) for kind in (b"wide", b"pnot", b"skip", b"free")),
    ),
    # Accepted if formats names them
    Format(
        "JPEG2000",
        (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
        _start(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
        decoder="Pillow",
        accepted="if named",
    ),
    Format("ICO", (".ico",), _start(b"\0\0\1\0"), accepted="if named", decoder="Pillow"),
    # Images that are only named
    Format(
        "JPEG XL",
        (".jxl",),
        _start(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
        hint="convert it first",
    ),
    Format("JPEG XR", (".jxr", ".wdp", ".hdp"), _start(b"II\xbc\1", b"II\xbc\0")),
    Format("DNG", (".dng",), hint=_RAW_HINT),
    Format("NEF", (".nef", ".nrw"), hint=_RAW_HINT),
    Format("ARW", (".arw", ".sr2", ".srf"), hint=_RAW_HINT),
    Format("RAW", (".pef", ".srw", ".3fr", ".erf", ".kdc", ".dcr", ".mef"), hint=_RAW_HINT),
    Format("ORF", (".orf",), _start(b"IIRO", b"IIRS", b"MMOR"), hint=_RAW_HINT),
    Format("RW2", (".rw2", ".rwl"), _start(b"IIU\0"), hint=_RAW_HINT),
    Format("RAF", (".raf",), _start(b"FUJIFILMCCD-RAW"), hint=_RAW_HINT),
    Format("CRW", (".crw",), _both(b"II\x1a\0", 6, b"HEAPCCDR"), hint=_RAW_HINT),
    Format("MRW", (".mrw",), _start(b"\0MRM"), hint=_RAW_HINT),
    Format("X3F", (".x3f",), _start(b"FOVb"), hint=_RAW_HINT),
    Format("PSD", (".psd", ".psb"), _start(b"8BPS")),
    Format("XCF", (".xcf",), _start(b"gimp xcf")),
    Format(  # by its kind, without text and palette, and its bits: there is no signature
        "TGA",
        (".tga", ".icb", ".vda", ".vst"),
        tuple(
            ((0, bytes((0, 0, kind, 0, 0, 0, 0, 0))), (16, bytes((bits,))))
            for kind in (2, 3, 10, 11)
            for bits in (8, 16, 24, 32)
        ),
    ),
    Format("CUR", (".cur",), _start(b"\0\0\2\0")),
    Format("ANI", (".ani",), _both(b"RIFF", 8, b"ACON")),
    Format("ICNS", (".icns",), _start(b"icns")),
    Format("OS/2 bitmap array", (".bmp", ".bga"), _both(b"BA", 14, b"BM")),
    Format("MNG", (".mng",), _start(b"\x8aMNG\r\n\x1a\n")),
    Format("JNG", (".jng",), _start(b"\x8bJNG\r\n\x1a\n")),
    Format("QOI", (".qoi",), _start(b"qoif")),
    Format("BPG", (".bpg",), _start(b"BPG\xfb")),
    Format("FLIF", (".flif",), _start(b"FLIF")),
    Format("DDS", (".dds",), _start(b"DDS ")),
    Format(
        "KTX", (".ktx", ".ktx2"), _start(b"\xabKTX 11\xbb\r\n\x1a\n", b"\xabKTX 20\xbb\r\n\x1a\n")
    ),
    Format("OpenEXR", (".exr",), _start(b"v/1\1")),
    Format("Radiance HDR", (".hdr", ".pic"), _start(b"#?RADIANCE", b"#?RGBE")),
    Format(
        "Netpbm",
        (".pbm", ".pgm", ".ppm", ".pnm", ".pam", ".pfm"),
        tuple(
            ((0, kind), (2, space))
            for kind in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"PF", b"Pf")
            for space in (b"\n", b" ", b"\t", b"\r")
        ),
    ),
    Format("PCX", (".pcx",), _start(*(bytes((10, version, 1)) for version in (0, 2, 3, 4, 5)))),
    Format(
        "SGI",
        (".sgi", ".rgb", ".bw"),
        _start(b"\x01\xda\0\1", b"\x01\xda\1\1", b"\x01\xda\0\2", b"\x01\xda\1\2"),
    ),
    Format("Sun raster", (".ras", ".sun"), _start(b"\x59\xa6\x6a\x95")),
    Format("XPM", (".xpm",), _start(b"/* XPM */")),
    Format("DjVu", (".djvu", ".djv"), _both(b"AT&TFORM", 12, b"DJV")),
    Format("WMF", (".wmf",), _start(b"\xd7\xcd\xc6\x9a", b"\1\0\x09\0\0\3")),
    Format("EMF", (".emf",), _both(b"\1\0\0\0", 40, b" EMF")),
    Format("DICOM", (".dcm", ".dicom"), _at(128, b"DICM")),
    Format("FITS", (".fits", ".fit"), _start(b"SIMPLE  =")),
    Format("NIfTI", (".nii",), _at(344, b"n+1\0", b"ni1\0")),
    # Documents, videos and other files
    Format("PDF", (".pdf", ".ai"), _start(b"%PDF-")),
    Format("PostScript", (".eps", ".ps"), _start(b"%!PS", b"\xc5\xd0\xd3\xc6")),
    Format("AVI", (".avi",), _both(b"RIFF", 8, b"AVI ")),
    Format("WAV", (".wav",), _both(b"RIFF", 8, b"WAVE")),
    Format("WebM or Matroska video", (".webm", ".mkv"), _start(b"\x1aE\xdf\xa3")),
    Format("Flash video", (".flv",), _start(b"FLV\1")),
    Format("Windows Media", (".wmv", ".asf"), _start(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")),
    Format("MPEG video", (".mpg", ".mpeg"), _start(b"\0\0\1\xba", b"\0\0\1\xb3")),
    Format("Ogg", (".ogg", ".ogv"), _start(b"OggS")),
    Format("MP3", (".mp3",), _start(b"ID3")),
    Format("HDF5", (".h5", ".hdf5", ".mat"), _start(b"\x89HDF\r\n\x1a\n")),
    Format("NumPy", (".npy",), _start(b"\x93NUMPY")),
    Format("Parquet", (".parquet",), _start(b"PAR1")),
    Format("SQLite", (".db", ".sqlite"), _start(b"SQLite format 3\0")),
    Format("gzip-compressed SVG", (".svgz",)),
    Format("gzip", (".gz", ".tgz"), _start(b"\x1f\x8b")),
    Format("bzip2", (".bz2",), _start(b"BZh")),
    Format("xz", (".xz",), _start(b"\xfd7zXZ\0")),
    Format("Zstandard", (".zst",), _start(b"\x28\xb5\x2f\xfd")),
    Format("zip", (".zip", ".npz", ".docx"), _start(b"PK\3\4", b"PK\5\6")),
    Format("7z", (".7z",), _start(b"7z\xbc\xaf\x27\x1c")),
    Format("RAR", (".rar",), _start(b"Rar!\x1a\7")),
    Format("tar", (".tar",), _at(257, b"ustar")),
    Format(
        "Git LFS pointer",
        (),
        _start(b"version https://git-lfs"),
        hint="run git lfs pull to get the file that it stands for",
    ),
    Format("SVG", (".svg",), hint="a vector image: convert it first"),
    Format("HTML", (".html", ".htm"), hint="often an error page that was saved as an image"),
    Format("XML", (".xml",)),
    Format("JSON", (".json",)),
    Format("plain text", (".txt", ".csv")),
)

BY_NAME = {format.name: format for format in TABLE}
_BY_BRAND = {brand: format for format in TABLE for brand in format.brands}
_ANY_CODING = (b"mif1", b"mif2", b"msf1")  # ISO/IEC 23008-12: HEIF, of HEVC unless said otherwise


def identify(data: bytes) -> Format | None:
    """Returns the row of a file, or ``None`` if it is not known.

    Args:
        data: The first bytes, ``HEAD_BYTES`` at least for accepted formats, or the whole file.
    """
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    for format in TABLE:
        if any(_matches(data, signature) for signature in format.signatures):
            return _gzip_format(data) if format.name == "gzip" else format
    return _text_format(data[:NAMING_BYTES])


def is_accepted(head: bytes, formats: Sequence[str]) -> bool:
    """Returns whether a file may be an image of an accepted format, by ``HEAD_BYTES`` bytes."""
    format = identify(head)
    return format is not None and format.name in formats


def check_format(data: bytes, formats: Sequence[str]) -> Format:
    """Returns the format of a file, which is one of ``formats``.

    Args:
        data: The file, or its first ``HEAD_BYTES + NAMING_BYTES`` bytes.
        formats: The accepted formats: names of the table.

    Raises:
        ImageError: ``empty``, or ``unsupported_format`` with the name of the format.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    format = identify(data)
    if format is None or format.name not in formats:
        raise ImageError("unsupported_format", in_words(format, data, formats))
    return format


def check_bytes(length: int, max_bytes: int) -> None:
    """Raises ``ImageError`` if a file has more than ``max_bytes`` bytes."""
    if length > max_bytes:
        raise ImageError("too_large", f"{length} bytes, max_bytes={max_bytes}")


def _matches(data: bytes, signature: Signature) -> bool:
    return all(data.startswith(magic, offset) for offset, magic in signature)


def in_words(format: Format | None, data: bytes = b"", formats: Sequence[str] = ()) -> str:
    start = f"starts with {data[:8]!r}"
    if format is None:
        brand = data[8:12] if data[4:8] == b"ftyp" else b""
        return f"ISO media of brand {brand!r}" if brand else start
    if format.name == "plain text":
        return f"{start}, plain text"
    if format.accepted == "if named":
        return f"{format.name}, which is accepted if the option formats names it"
    return f"{format.name}, {format.hint}" if format.hint else format.name


def _iso_format(data: bytes) -> Format | None:
    """Returns the format of an ISO medium by its major brand, else by its compatible brands."""
    end = min(int.from_bytes(data[:4], "big"), len(data))
    brands = [data[8:12], *(data[start : start + 4] for start in range(16, end, 4))]
    if brands[0] in _BY_BRAND and brands[0] not in _ANY_CODING:
        return _BY_BRAND[brands[0]]
    compatible = [brand for brand in brands if brand in _BY_BRAND]
    specific = [_BY_BRAND[brand] for brand in compatible if brand not in _ANY_CODING]
    images = [format for format in specific if format.decoder]
    general = [_BY_BRAND[brand] for brand in compatible if brand in _ANY_CODING]
    return next(iter(images or general or specific), None)


def _gzip_format(data: bytes) -> Format:
    try:
        content = zlib.decompressobj(wbits=31).decompress(data[:NAMING_BYTES], NAMING_BYTES)
    except zlib.error:
        content = b""
    format = _text_format(content)
    return BY_NAME["gzip-compressed SVG" if format == BY_NAME["SVG"] else "gzip"]


# What may stand before the root element: blanks, declarations, comments and a document type.
_PROLOG = re.compile(
    rb"(?:\s+|<\?.*?\?>|<!--.*?-->|<!doctype(?P<type>[^>\[]*)(?:\[.*?\])?\s*>)*", re.I | re.S
)
_ROOT = re.compile(rb"<(?:[\w.-]+:)?([\w.-]+)[\s/>]")
_JSON = re.compile(rb"\s*[\[{]\s*(?:[\"\[{\]}\d-]|true|false|null)")
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def _text_format(start: bytes) -> Format | None:
    """Returns the format of a text by its beginning; ``None`` if it is not text."""
    text = _as_text(start)
    if text is None:
        return None
    encoded = text.encode()
    prolog = _PROLOG.match(encoded)
    assert prolog is not None  # it matches nothing, too
    root = _ROOT.match(encoded, prolog.end())
    names = (prolog["type"] or b"").lower().split()[:1] or [root[1].lower() if root else b""]
    if names[0] in (b"svg", b"html"):
        return BY_NAME[names[0].decode().upper()]
    if names[0] in (b"head", b"body", b"title", b"script", b"div", b"p", b"h1"):
        return BY_NAME["HTML"]  # as browsers do
    if root or encoded.lstrip().startswith((b"<?xml", b"<!--")):
        return BY_NAME["XML"]
    return BY_NAME["JSON" if _JSON.match(encoded) else "plain text"]


# With a byte order mark, and without one before "<" (XML 1.0, appendix F)
_UTF_16 = {
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}


def _as_text(start: bytes) -> str | None:
    """Decodes text in UTF-8 or UTF-16, or markup in Latin-1. It may be cut anywhere."""
    encoding = _UTF_16.get(start[:2], "utf-8-sig")
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start)
    except UnicodeDecodeError:
        if not start.lstrip().startswith(b"<"):
            return None
        text = start.decode("latin-1")
    return None if not text or _CONTROL.search(text) else text
