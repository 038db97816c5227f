"""PySpark's daemon with imagevec's imports done: workers are forked from it, and start at once.

``spark.python.daemon.module=imagevec.spark.daemon`` (of ``recommended_conf``) makes an executor use
it. Importing PyTorch and torchvision takes seconds; here that happens once an executor, and the
memory is shared. No thread is started before the fork.
"""

from __future__ import annotations

from pyspark.daemon import manager

import imagevec.spark.udf  # noqa: F401

if __name__ == "__main__":
    manager()
