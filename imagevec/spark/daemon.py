"""PySpark's daemon with imagevec already imported, so that the workers it forks start immediately.

``spark.python.daemon.module=imagevec.spark.daemon``, set by ``recommended_conf``, makes executors
use it. The imports take about a second. They run once per executor, and workers share their memory.
The daemon does not import PyTorch, which workers of the OpenVINO engine do not need. Each worker of
the PyTorch engine imports it once. No thread starts before the fork.
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
        """Runs PySpark's worker, without a traceback if the JVM exits first."""
        try:
            return work(*arguments)
        except BrokenPipeError:
            os._exit(1)

    daemon.worker = quiet_worker  # type: ignore[assignment]
    freeze_heap()  # else the workers' garbage collector walks it after each task, and copies it
    daemon.manager()
