"""PySpark's daemon with imagevec's imports done: workers are forked from it, and start at once.

``spark.python.daemon.module=imagevec.spark.daemon`` (of ``recommended_conf``) makes an executor use
it. The imports take about a second, here once an executor, and their memory is shared. It does not
import PyTorch, which the workers of the OpenVINO engine do without: those of the PyTorch engine do
it themselves, once. No thread is started before the fork.
"""

from __future__ import annotations

import os
from typing import Any

if __name__ == "__main__":
    from pyspark import daemon

    from imagevec.engines import backend
    from imagevec.options import ENGINES
    from imagevec.runtime import freeze_heap

    for name in ENGINES:
        if backend(name).is_available() and not backend(name).BUILDS_MODULE:
            backend(name).preload()
    work = daemon.worker

    def quiet_worker(*arguments: Any) -> int:
        """PySpark's, which prints a traceback where the JVM has ended before it."""
        try:
            return work(*arguments)
        except BrokenPipeError:
            os._exit(1)

    daemon.worker = quiet_worker  # type: ignore[assignment]
    freeze_heap()  # or the workers' garbage collector would walk it after each task, and copy it
    daemon.manager()
