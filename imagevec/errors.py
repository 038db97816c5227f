"""The exceptions that imagevec raises.

ImageVecError
├── OptionError (also ValueError)         a wrong option or input column
├── MissingExtraError (also ImportError)  an optional dependency is not installed
├── WeightsError                          weights cannot be found, read, verified or loaded
├── FingerprintError                      features are not comparable
├── SerializationError                    a function captures an object that must not be pickled
├── ReadError                             a file could not be read; a retry may succeed
├── WriteError                            a file could not be written; a retry may succeed
└── ImageError                            one image cannot become a feature vector
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping


class ImageVecError(Exception):
    """The base class of all exceptions that imagevec raises."""


class OptionError(ImageVecError, ValueError):
    """An option or the type of an input column is not valid."""


class MissingExtraError(ImageVecError, ImportError):
    """A required optional dependency is not installed.

    Args:
        package: The module that cannot be imported.
        extra: The imagevec extra that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'imagevec[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)  # pickle the arguments, not the message


@contextlib.contextmanager
def pyspark_required() -> Iterator[None]:
    """Raises ``MissingExtraError`` where an import fails because PySpark is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("pyspark", "py4j"):
            raise
        raise MissingExtraError("pyspark", "spark") from error


class WeightsError(ImageVecError):
    """Model weights are missing, unreadable or altered, or belong to another model."""


class FingerprintError(ImageVecError):
    """Features differ in model, precision or preprocessing, or lack this information."""


class SerializationError(ImageVecError):
    """A function for workers captures an object that must not or cannot be pickled."""


class ReadError(ImageVecError):
    """A file cannot be read, or a folder listed, for a reason such as a store that is down or
    rejects the credentials. The task fails, so that the file is never treated as a bad image."""


class WriteError(ImageVecError):
    """A file of a table cannot be written, for a reason such as a store that is down or rejects the
    credentials, or a disk that is full."""


class ImageError(ImageVecError):
    """One image cannot become a feature vector.

    Attributes:
        code: A short, stable reason to group by, one of the keys of ``IMAGE_ERROR_CODES``.
        detail: A human-readable explanation, which may change between versions.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


IMAGE_ERROR_CODES: Mapping[str, str] = {
    "empty": "the file is empty",
    "unsupported_format": "not an image, or an unsupported format or pixel layout",
    "too_large": "more pixels than max_pixels, by the header, or more bytes than max_bytes",
    "truncated": "the file ends before the image does",
    "corrupt": "the file has an accepted format but cannot be decoded",
    "crashed": "the decoder killed its process (with isolate=True)",
    "timed_out": "the decoder timed out (with isolate=True)",
    "unreadable_path": "the file does not exist, or the URI is malformed or has an unknown scheme",
    "forbidden_path": "the path or URI is not under any of allowed_roots",
    "bad_box": "a box is null, empty or outside the image, or an image has more than 10,000 boxes",
}


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Returns the end of an error message: the choices nearest to ``value``, or all if few."""
    known = sorted(choices)
    by_folded = {choice.casefold(): choice for choice in known}
    folded = difflib.get_close_matches(str(value).casefold(), by_folded, n=3, cutoff=0.5)
    if folded:
        return f"did you mean {' or '.join(repr(by_folded[name]) for name in folded)}?"
    if len(known) <= 12:
        return f"choose one of {', '.join(map(repr, known))}"
    return f"{len(known)} are known, for example {', '.join(map(repr, known[:3]))}"
