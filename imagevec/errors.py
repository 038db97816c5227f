"""Every exception that imagevec raises on purpose.

ImageVecError
├── OptionError (also ValueError)         a wrong option or input column
├── MissingExtraError (also ImportError)  an optional dependency is not installed
├── WeightsError                          weights cannot be found, read, verified or fitted
├── FingerprintError                      features that cannot be compared with others
├── SerializationError                    a function captures what must not be pickled
├── ReadError                             a file could not be read, for a reason that may pass
└── ImageError                            one image cannot become a feature vector
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class ImageVecError(Exception):
    """The base of every exception raised by imagevec."""


class OptionError(ImageVecError, ValueError):
    """An option, or the type of an input column, is not one that imagevec accepts."""


class MissingExtraError(ImageVecError, ImportError):
    """An optional dependency is needed and not installed.

    Args:
        package: The module that could not be imported.
        extra: The extra of imagevec that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'imagevec[{extra}]'")
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)  # pickled by its arguments, not its text


class WeightsError(ImageVecError):
    """Model weights are missing, unreadable, altered, or of another model."""


class FingerprintError(ImageVecError):
    """Features are of another model, precision or preprocessing, or do not say of which."""


class SerializationError(ImageVecError):
    """A function that is to run on workers captures what must not, or cannot, be pickled."""


class ReadError(ImageVecError):
    """A file could not be read, for a reason that is not the file's: the store may be down, or
    refuse the credentials. It fails the task, so that the file is never taken for a bad image."""


class ImageError(ImageVecError):
    """One image cannot become a feature vector.

    Attributes:
        code: A short stable reason to group by, a key of ``IMAGE_ERROR_CODES``.
        detail: What was found, for a person; not stable between versions.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


IMAGE_ERROR_CODES: Mapping[str, str] = {
    "empty": "no bytes at all",
    "unsupported_format": "not an image, or a format or pixel layout that is not accepted",
    "too_large": "more pixels than max_pixels, by its header",
    "truncated": "the file ends before the image does",
    "corrupt": "the file says it is an accepted format and cannot be decoded",
    "crashed": "its decoder killed the process (with isolate=True)",
    "timed_out": "its decoder timed out (with isolate=True)",
    "unreadable_path": "there is no such file, or the URI is malformed or of an unknown scheme",
    "forbidden_path": "the path or URI is under none of allowed_roots",
}


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """The end of an error message: the nearest choices to ``value``, or all where they are few."""
    known = sorted(choices)
    by_folded = {choice.casefold(): choice for choice in known}
    folded = difflib.get_close_matches(str(value).casefold(), by_folded, n=3, cutoff=0.5)
    if folded:
        return f"did you mean {' or '.join(repr(by_folded[name]) for name in folded)}?"
    if len(known) <= 12:
        return f"choose one of {', '.join(map(repr, known))}"
    return f"{len(known)} are known, for example {', '.join(map(repr, known[:3]))}"
