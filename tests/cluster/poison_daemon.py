"""PySpark's daemon with a decoder that some bytes kill, as a bug in native code would.

Python's multiprocessing imports the main module in spawned processes, too: the poison also works in
the child process of ``isolate=True``.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from pyspark.daemon import manager

import imagevec.images.decode

POISON = b"\xff\xd8\xffpoison"  # a JPEG by its first bytes

_opened = imagevec.images.decode._opened


def _deadly(data: bytes, *arguments: Any) -> Any:
    if data == POISON:
        os.kill(os.getpid(), signal.SIGSEGV)
    return _opened(data, *arguments)


setattr(imagevec.images.decode, "_opened", _deadly)  # noqa: B010

if __name__ == "__main__":
    manager()
