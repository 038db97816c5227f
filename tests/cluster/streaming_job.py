"""A streaming query of images to Parquet, as a process that a test can kill.

    python -m tests.cluster.streaming_job SOURCE SINK CHECKPOINT [once]

With ``once`` it ends when all that is there is done; without, it goes on until it is killed.
"""

from __future__ import annotations

import sys
from typing import Any

from imagevec import features_udf
from tests.helpers.clusters import session_of
from tests.helpers.factories import tiny

BINARY_FILE = "path string, modificationTime timestamp, length long, content binary"


def main(source: str, sink: str, checkpoint: str, once: str = "") -> None:
    with session_of("local[2]") as spark:
        files = (
            spark.readStream.format("binaryFile")
            .schema(BINARY_FILE)
            .option("maxFilesPerTrigger", 2)
            .load(source)
        )
        options: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}
        features = features_udf("content", output="struct", **options)
        writer = (
            files.withColumn("result", features)
            .select("path", "result.features", "result.error")
            .writeStream.format("parquet")
            .option("checkpointLocation", checkpoint)
        )
        trigger = {"availableNow": True} if once else {"processingTime": "0 seconds"}
        query = writer.trigger(**trigger).start(sink)
        query.awaitTermination()


if __name__ == "__main__":
    main(*sys.argv[1:])
