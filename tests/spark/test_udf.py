from __future__ import annotations

import functools
import io
import os
import pickle
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import cloudpickle
import numpy as np
import pytest
import torch
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, FloatType

from imagevec import (
    ImageVectorizer,
    OptionError,
    Preprocessing,
    features_udf,
    make_features_udf,
    provenance,
    register_model,
)
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, logging_tiny, tiny
from tests.helpers.images import encode, of_mode, photo
from tests.helpers.options import WRONG_OPTIONS, option_id
from tests.helpers.pipeline import run_python

IMAGES = [encode(photo(seed=seed)) for seed in range(5)]
JPEG = encode(photo(seed=5), "JPEG")
MIXED = [IMAGES[0], None, b"garbage", JPEG, b"", IMAGES[1], JPEG[:300], IMAGES[2], None, IMAGES[3]]
CODES = [None, None, "unsupported_format", None, "empty", None, "truncated", None, None, None]

TINY: dict[str, Any] = {"model": tiny, "weights": "random", "engine": "torch"}


@pytest.fixture(scope="module")
def expected() -> dict[bytes, list[float]]:
    """The vector of each good image, computed without Spark."""
    vectorizer: Any = ImageVectorizer(**TINY)
    return {image: vectorizer.extract_features(image) for image in [*IMAGES, JPEG]}


def vectors(df, column="features") -> list[Any]:
    return [row[column] for row in df.select(column).collect()]


def assert_vectors(ours, theirs) -> None:
    assert [vector is None for vector in ours] == [vector is None for vector in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if our is not None:
            np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)


def test_a_binary_column_becomes_vectors(frame, expected):
    df = frame(IMAGES).withColumn("features", features_udf("content", **TINY))
    assert df.columns == ["id", "content", "features"]
    assert df.schema["features"].dataType == ArrayType(FloatType())
    assert_vectors(vectors(df), [expected[image] for image in IMAGES])


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_workers_use_the_input_size(frame, expected, engine):
    options = {**TINY, "engine": engine}
    vectorizer: Any = ImageVectorizer(**options, input_size=(64, 96))
    df = frame(IMAGES).withColumn(
        "features", features_udf("content", **options, input_size=[64, 96])
    )
    ours = vectors(df)
    assert_vectors(ours, [vectorizer.extract_features(image) for image in IMAGES])
    assert not np.allclose(ours[0], expected[IMAGES[0]], rtol=1e-3)
    made_of = provenance(df)
    assert made_of.fingerprint == vectorizer.spec.fingerprint
    assert made_of.preprocessing == Preprocessing().with_input_size((64, 96))


def test_a_column_may_be_given_as_an_expression(frame, expected):
    df = frame(IMAGES[:2]).select(features_udf(F.col("content"), **TINY).alias("features"))
    assert_vectors(vectors(df), [expected[image] for image in IMAGES[:2]])


@pytest.mark.parametrize("arrow_rows", [1, 7, 10_000], indirect=True)
def test_rows_stay_in_order_whatever_the_arrow_batch(frame, expected, arrow_rows):
    values = MIXED * 3
    df = frame(values).withColumn("features", features_udf("content", **TINY, batch_size=4))
    rows = df.select("id", "features").collect()
    assert [row.id for row in rows] == list(range(len(values)))
    assert_vectors([row.features for row in rows], [expected.get(value) for value in values])


@pytest.mark.parametrize("partitions", [1, 5, 14])
def test_partitions_do_not_matter(frame, expected, partitions):
    df = frame(MIXED, partitions).withColumn("features", features_udf("content", **TINY))
    assert df.rdd.getNumPartitions() == partitions
    assert_vectors(vectors(df), [expected.get(value) for value in MIXED])


def test_a_shuffle_keeps_rows_with_their_vectors(frame, expected):
    df = frame(MIXED).repartition(3, "id").withColumn("features", features_udf("content", **TINY))
    rows = sorted(df.collect(), key=lambda row: row.id)
    assert_vectors([row.features for row in rows], [expected.get(value) for value in MIXED])


def test_a_struct_tells_why(frame, expected):
    df = frame(MIXED).withColumn("result", features_udf("content", **TINY, output="struct"))
    expected_type = (
        "struct<features:array<float>,error:string,width:int,height:int,truncated:boolean>"
    )
    assert df.schema["result"].dataType.simpleString() == expected_type
    results = vectors(df, "result")
    assert_vectors([result.features for result in results], [expected.get(v) for v in MIXED])
    assert [result.error and result.error.partition(":")[0] for result in results] == CODES
    sizes = [(80, 60) if value in expected else (None, None) for value in MIXED]
    assert [(result.width, result.height) for result in results] == sizes


def test_a_struct_may_have_no_image_at_all(frame):
    df = frame([None, b"garbage"]).select(features_udf("content", **TINY, output="struct"))
    null, garbage = (row[0] for row in df.collect())
    assert (null.features, null.error, null.width) == (None, None, None)
    assert garbage.features is None
    assert garbage.error.startswith("unsupported_format: ")


def test_on_error_raise_fails_the_query_with_the_reason(frame):
    good = frame([IMAGES[0], None]).select(features_udf("content", **TINY, on_error="raise"))
    assert len(good.collect()) == 2
    bad = frame([IMAGES[0], b"garbage"]).select(features_udf("content", **TINY, on_error="raise"))
    with pytest.raises(Exception, match="unsupported_format: .*garbage"):
        bad.collect()


def test_no_rows_are_no_rows(frame):
    df = frame(IMAGES[:2]).where("id < 0")
    assert df.select(features_udf("content", **TINY)).collect() == []
    assert df.select(features_udf("content", **TINY, output="struct")).collect() == []


def test_a_query_may_stop_early(frame, expected):
    df = frame(IMAGES * 20, partitions=1).select(features_udf("content", **TINY, batch_size=2))
    for _ in range(2):
        assert_vectors([df.first()[0]], [expected[IMAGES[0]]])
    assert df.count() == 100


def test_a_field_of_a_struct_is_a_column(frame, expected):
    df = frame(IMAGES[:2]).select(F.struct("content").alias("photo"))
    df = df.withColumn("features", features_udf("photo.content", **TINY))
    assert_vectors(vectors(df), [expected[image] for image in IMAGES[:2]])


def test_paths_are_read_by_the_workers(frame, folder, expected):
    paths = [folder / "a b.png", folder / "c.png", folder / "d.png", folder / "none.png"]
    values = [str(paths[0]), paths[1].as_uri(), f"file:{paths[0]}", *map(str, paths[2:]), None]
    df = frame(values, type="string")
    results = vectors(df.select(features_udf("content", **TINY, output="struct").alias("r")), "r")
    a, c = (expected[image] for image in IMAGES[1:3])
    assert_vectors([result.features for result in results], [a, c, a, None, None, None])
    codes = [result.error and result.error.partition(":")[0] for result in results]
    assert codes == [None, None, None, "unsupported_format", "unreadable_path", None]


def test_the_path_of_a_binary_file_is_a_path(spark, folder, expected):
    files = spark.read.format("binaryFile").load(str(folder)).orderBy("path")
    a, c = (expected[image] for image in IMAGES[1:3])
    df = files.withColumn("features", features_udf("path", **TINY))
    assert_vectors(vectors(df), [a, c, None])


def test_a_binary_file_row_is_an_image(spark, folder, expected):
    files = spark.read.format("binaryFile").load(str(folder)).orderBy("path")
    df = files.select(F.struct("*").alias("file")).unionByName(
        files.select(F.lit(None).cast(files.schema).alias("file")).limit(1)
    )
    a, c = (expected[image] for image in IMAGES[1:3])
    assert_vectors(
        vectors(df.withColumn("features", features_udf("file", **TINY))), [a, c, None, None]
    )


def test_a_struct_of_bytes_and_path_is_an_image(frame, folder, expected):
    """As Hugging Face's Parquet files have it: the path counts where there are no bytes."""
    a, c = (str(folder / name) for name in ("a b.png", "c.png"))
    structs: list[Any]
    structs = [(IMAGES[0], "0.png"), (IMAGES[3], None), (None, a), (IMAGES[4], c), (None, c)]
    structs += [(None, f"{folder}/none.png"), (b"garbage", a), (None, None), None]
    images = [IMAGES[0], IMAGES[3], IMAGES[1], IMAGES[4], IMAGES[2], None, None, None, None]
    codes = [None] * 5 + ["unreadable_path", "unsupported_format", None, None]
    df = frame(structs, type="struct<bytes: binary, path: string>")
    found = df.select(features_udf("content", **TINY, output="struct").alias("result"))
    results = vectors(found, "result")
    assert_vectors([result.features for result in results], [expected.get(i) for i in images])
    assert [result.error and result.error.partition(":")[0] for result in results] == codes
    processed = ImageVectorizer(**TINY).process_images(df)
    assert_vectors(vectors(processed), [expected.get(image) for image in images])


def test_a_store_that_cannot_be_reached_fails_the_query(frame, folder):
    """A null would say that another try gives a null, too."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
    options = {**TINY, "read_timeout_seconds": 1}
    # One task: Spark 3.5 also closes the pooled workers of other tasks of a job that fails.
    df = frame([str(folder / "c.png"), uri], 1, type="string")
    for output in ("array", "struct"):
        with pytest.raises(Exception, match=f"ReadError: {uri} cannot be read: .*connect"):
            df.select(features_udf("content", **options, output=output)).collect()
    structs = frame([(None, uri)], 1, type="struct<bytes: binary, path: string>")
    with pytest.raises(Exception, match=f"ReadError: {uri} cannot be read"):
        ImageVectorizer(**options).process_images(structs).collect()


def test_sparks_image_struct_is_an_image(spark, folder, expected):
    images = spark.read.format("image").load(str(folder)).orderBy("image.origin")
    nulls = spark.createDataFrame([(None,)], images.schema)
    df = nulls.union(images).union(nulls)
    a, c = (expected[image] for image in IMAGES[1:3])
    found = vectors(df.withColumn("features", features_udf("image", **TINY)))
    assert_vectors(found, [None, a, c, None, None])


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_sparks_image_struct_may_be_grey_or_have_alpha(spark, tmp_path, mode):
    data = encode(of_mode(mode))
    (tmp_path / "a.png").write_bytes(data)
    df = spark.read.format("image").load(str(tmp_path))
    found = vectors(df.withColumn("features", features_udf("image", **TINY)))
    assert_vectors(found, [ImageVectorizer(**TINY).extract_features(data)])


def test_another_column_type_fails_with_what_is_accepted(frame):
    with pytest.raises(Exception, match="int values.*binary.*string"):
        frame(IMAGES).select(features_udf("id", **TINY)).collect()


def test_an_array_fails_with_explode(frame):
    with pytest.raises(Exception, match="the input is an array: use .*explode"):
        frame(IMAGES[:1]).select(features_udf(F.array("content"), **TINY)).collect()


def test_the_binary_field_of_a_struct_is_the_image(frame, expected):
    df = frame(IMAGES[:2]).select("id", F.struct(F.col("id").alias("bytes"), "content").alias("s"))
    df = ImageVectorizer(**TINY).process_images(df, "s")
    assert_vectors(vectors(df), [expected[image] for image in IMAGES[:2]])


def test_it_can_be_registered_for_sql(spark, frame, expected):
    spark.udf.register("image_features", make_features_udf(**TINY))
    frame(IMAGES).createOrReplaceTempView("photos")
    df = spark.sql("SELECT image_features(content) AS features FROM photos WHERE id > 1")
    assert_vectors(vectors(df), [expected[image] for image in IMAGES[2:]])


def test_two_models_go_into_one_query(frame, expected):
    logits = ImageVectorizer(**TINY, layer="logits")
    df = frame(MIXED).select(
        features_udf("content", **TINY).alias("features"),
        features_udf("content", **TINY, layer="logits").alias("logits"),
    )
    rows = df.collect()
    assert_vectors([row.features for row in rows], [expected.get(value) for value in MIXED])
    assert_vectors(
        [row.logits for row in rows], [logits.extract_features(v) if v else None for v in MIXED]
    )


LAYERS = ("conv", "pooled", "logits")


@pytest.fixture(scope="module")
def expected_layers() -> dict[bytes, dict[str, list[float]]]:
    vectorizer: Any = ImageVectorizer(**TINY, layer=LAYERS)
    return {image: vectorizer.extract_features(image) for image in [*IMAGES, JPEG]}


def assert_layers(found, expected_layers) -> None:
    for layer in LAYERS:
        theirs = [expected_layers[v][layer] if v in expected_layers else None for v in MIXED]
        assert_vectors([row[layer] for row in found], theirs)


def test_several_layers_are_a_struct(frame, expected_layers):
    df = frame(MIXED).withColumn("features", features_udf("content", **TINY, layer=LAYERS))
    expected_type = "struct<conv:array<float>,pooled:array<float>,logits:array<float>>"
    assert df.schema["features"].dataType.simpleString() == expected_type
    assert_layers(vectors(df), expected_layers)
    assert df.where("features.pooled IS NULL").count() == 5


def test_several_layers_go_into_the_struct(frame, expected_layers):
    options = {**TINY, "layer": list(LAYERS), "output": "struct"}
    df = frame(MIXED).withColumn("result", features_udf("content", **options))
    results = vectors(df, "result")
    assert_layers([result.features for result in results], expected_layers)
    assert [result.error and result.error.partition(":")[0] for result in results] == CODES


def test_a_layers_name_may_hold_dots(frame):
    options = {**TINY, "model": "squeezenet1_1"}
    vectorizer: Any = ImageVectorizer(**options, layer=("features.3", "pooled"))
    df = vectorizer.process_images(frame(IMAGES[:1]))
    df = df.select(F.col("features.`features.3`").alias("vector"))
    expected = vectorizer.extract_features(IMAGES[0])["features.3"]
    assert_vectors(vectors(df, "vector"), [expected])


def test_vectors_can_be_used_in_the_query(frame):
    df = frame(MIXED).withColumn("features", features_udf("content", **TINY))
    assert df.where("features IS NULL").count() == 5
    assert df.select(F.size("features").alias("size")).distinct().where("size > 0").first()[0] == 8


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_workers_compute_what_the_driver_computes(frame, engine, precision):
    options = {
        "model": "squeezenet1_1",
        "weights": "random",
        "engine": engine,
        "precision": precision,
        "normalize": True,
    }
    vectorizer = ImageVectorizer(**options)
    df = vectorizer.process_images(frame(IMAGES[:3]))
    theirs = np.array([vectorizer.extract_features(image) for image in IMAGES[:3]])
    tolerance = 1e-5 if precision == "float32" else 1e-2
    np.testing.assert_allclose(vectors(df), theirs, atol=tolerance)


def test_a_factory_may_be_local(frame):
    def local():
        class Local(Tiny):
            pass

        return Local()

    options = {**TINY, "model": local}
    df = frame(IMAGES[:2]).withColumn("features", features_udf("content", **options))
    vectorizer = ImageVectorizer(**options)
    assert_vectors(vectors(df), [vectorizer.extract_features(image) for image in IMAGES[:2]])


def test_a_registered_model_is_known_to_workers(frame):
    register_model("registered for spark", tiny, preprocessing=Preprocessing(crop_size=32))
    options = {**TINY, "model": "registered for spark"}
    df = frame(IMAGES[:2]).withColumn("features", features_udf("content", **options))
    vectorizer = ImageVectorizer(**options)
    assert_vectors(vectors(df), [vectorizer.extract_features(image) for image in IMAGES[:2]])


def test_an_exported_program_runs_on_workers(frame, tmp_path):
    program = torch.export.export(
        Tiny().eval(),
        (torch.zeros(2, 3, 32, 32),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    torch.export.save(program, tmp_path / "tiny.pt2")
    options: dict[str, Any] = {"model": str(tmp_path / "tiny.pt2"), "engine": "torch"}
    df = frame(IMAGES[:2]).withColumn("features", features_udf("content", **options))
    vectorizer = ImageVectorizer(**options)
    assert_vectors(vectors(df), [vectorizer.extract_features(image) for image in IMAGES[:2]])


def test_a_model_is_loaded_once_per_worker(frame, tmp_path):
    log = tmp_path / "built"
    options = {**TINY, "model": functools.partial(logging_tiny, str(log))}
    df = frame(IMAGES * 2, partitions=8)
    udf = make_features_udf(**options)
    recreated = make_features_udf(**options)
    for query in (udf, udf, recreated):
        assert len(df.select(query("content")).collect()) == 10
    built = Counter(map(int, log.read_text().split()))
    del built[os.getpid()]
    assert set(built.values()) == {1}
    assert 1 <= len(built) <= 8  # of 24 tasks


class Modules(pickle.Unpickler):
    """Remembers the modules of what it unpickles."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.found: set[str] = set()

    def find_class(self, module: str, name: str) -> object:
        self.found.add(module)
        return super().find_class(module, name)


def modules_in(pickled: bytes) -> set[str]:
    unpickler = Modules(io.BytesIO(pickled))
    unpickler.load()
    return unpickler.found


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("model", ["resnet50", tiny, lambda: Tiny()], ids=["name", "function", "λ"])
@pytest.mark.usefixtures("spark")
def test_what_is_pickled_is_small_and_holds_nothing_of_spark(model, engine):
    udf = make_features_udf(model=model, weights="random", engine=engine)
    pickled = cloudpickle.dumps(udf.func)
    assert len(pickled) < 100_000
    modules = modules_in(pickled)
    assert "imagevec.plan" in modules
    assert not {module for module in modules if module.startswith(("pyspark", "py4j"))}


def test_what_spark_sends_is_small(spark):
    try:
        from pyspark.core.rdd import _prepare_for_python_RDD
    except ImportError:  # PySpark 3.5
        from pyspark.rdd import _prepare_for_python_RDD  # type: ignore[no-redef]

    udf = make_features_udf(model="resnet50", weights="random")
    command, broadcasts, _, _ = _prepare_for_python_RDD(
        spark.sparkContext, (udf.func, udf.returnType)
    )
    assert len(command) < 100_000
    assert list(broadcasts) == []


@pytest.mark.parametrize(("option", "fix"), WRONG_OPTIONS, ids=option_id)
def test_a_wrong_option_is_refused_before_a_job_starts(frame, jobs_started, option, fix):
    df = frame(IMAGES[:1])
    with pytest.raises(OptionError) as refused:
        df.select(features_udf("content", **{**TINY, "model": "squeezenet1_1", **option}))
    assert fix in str(refused.value)
    assert jobs_started() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_before_a_job_starts(frame, jobs_started, device):
    df = frame(IMAGES[:1])
    for refuse in (
        lambda: features_udf("content", **TINY, device=device),
        lambda: ImageVectorizer(**TINY, device=device).process_images(df),
    ):
        with pytest.raises(OptionError, match=rf"device='{device}.*'cpu' or 'auto'"):
            refuse()
    assert jobs_started() == 0


@pytest.mark.parametrize(
    ("column", "fix"),
    [
        ("contnt", "'content'"),
        ("id", "of type int: use a column of type binary"),
        ("ids", "of type array<int>: use pyspark.sql.functions.explode"),
        ("images", "of type array<binary>: use pyspark.sql.functions.explode"),
        ("row", "of type struct<id:int>: use a column of type binary"),
        ("number", "of type struct<bytes:int>: use a column of type binary"),
    ],
)
def test_a_wrong_column_is_refused_before_a_job_starts(frame, jobs_started, column, fix):
    df = frame(IMAGES[:1]).withColumns(
        {
            "ids": F.array("id"),
            "images": F.array("content"),
            "row": F.struct("id"),
            "number": F.struct(F.col("id").alias("bytes")),
        }
    )
    with pytest.raises(OptionError) as refused:
        ImageVectorizer(**TINY).process_images(df, column)
    assert repr(column) in str(refused.value)
    assert fix in str(refused.value)
    assert jobs_started() == 0


def test_jobs_are_counted(frame, jobs_started):
    df = frame(IMAGES[:1]).select(features_udf("content", **TINY))
    assert jobs_started() == 0
    df.collect()
    assert jobs_started() > 0


def test_process_images_adds_a_column(frame, expected):
    df = ImageVectorizer(**TINY).process_images(frame(MIXED))
    assert df.columns == ["id", "content", "features"]
    assert_vectors(vectors(df), [expected.get(value) for value in MIXED])


def test_process_images_takes_other_names(frame, expected):
    df = frame(IMAGES[:2]).withColumnRenamed("content", "photo")
    df = ImageVectorizer(**TINY).process_images(df, input_col="photo", output_col="vector")
    assert df.columns == ["id", "photo", "vector"]
    assert_vectors(vectors(df, "vector"), [expected[image] for image in IMAGES[:2]])


def test_process_images_takes_any_column_name(frame, expected):
    df = frame(IMAGES[:1]).withColumnRenamed("content", "the.photo")
    df = ImageVectorizer(**TINY).process_images(df, input_col="the.photo")
    assert_vectors(vectors(df), [expected[IMAGES[0]]])


def test_process_images_works_in_a_thread(frame, expected):
    df = frame(IMAGES[:1])
    with ThreadPoolExecutor() as pool:
        processed = pool.submit(ImageVectorizer(**TINY).process_images, df).result()
    assert_vectors(vectors(processed), [expected[IMAGES[0]]])


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_the_session_stays_the_active_one(spark, engine):
    ImageVectorizer(model=tiny, weights="random", engine=engine).extract_features(JPEG)
    assert type(spark).getActiveSession() is spark


def test_without_a_session_the_error_says_so():
    printed = run_python("""
from imagevec import ImageVecError, make_features_udf
try:
    make_features_udf(model="squeezenet1_1", weights="random", engine="torch")
except ImageVecError as error:
    print(error)
""")
    assert "no active SparkSession" in printed
    assert "SparkSession.builder.getOrCreate()" in printed


@pytest.mark.java
def test_a_worker_imports_what_its_plan_needs():
    """In sessions of their own, whose workers serve one plan alone, with and without isolation."""
    for package in ("openvino", "open_clip"):
        pytest.importorskip(package)
    printed = run_python("""
import sys
from collections.abc import Iterator
from functools import partial
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.functions import pandas_udf
from imagevec import features_udf, text_features_udf
from tests.helpers.images import encode, photo

def modules(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
    from imagevec import runtime

    heavy = {"torch", "torchvision", "timm", "open_clip", "transformers", "openvino"}
    for batch in batches:
        found = sorted(heavy & sys.modules.keys())
        yield pd.Series([f"{len(runtime._engines)} {found}"] * len(batch))

columns = {}
for engine in ("torch", "openvino"):
    images = partial(features_udf, "content", model="resnet18", weights="random", engine=engine)
    columns[engine] = [partial(images, isolate=isolate) for isolate in (False, True)]
clip = {"model": "open_clip/ViT-S-32-alt", "weights": "random", "engine": "openvino"}
columns["texts"] = [partial(text_features_udf, "text", **clip)]
for name, made in columns.items():
    for module in ("pyspark.daemon", "imagevec.spark.daemon")[name == "texts" :]:
        spark = (
            SparkSession.builder.master("local[1]")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.python.daemon.module", module)
            .getOrCreate()
        )
        rows = [(encode(photo()), "a cat")]
        df = spark.createDataFrame(rows, "content binary, text string").coalesce(1)
        for column in made:
            ((vector,),) = df.select(column()).collect()  # first() would end the worker
        probe = pandas_udf(modules, "string")
        print(name, len(vector), df.select(probe("text")).collect()[0][0])
        spark.stop()
""")
    # One engine: it is the worker that served the plan.
    assert printed.splitlines()[-5:] == [
        "torch 512 1 ['torch', 'torchvision']",
        "torch 512 1 ['openvino', 'torch', 'torchvision']",
        "openvino 512 1 ['openvino']",
        "openvino 512 1 ['openvino']",
        "texts 256 1 ['openvino']",
    ]


def test_a_session_whose_tasks_have_gpus_decides_auto(spark, monkeypatch, frame):
    asked = []
    monkeypatch.setattr("imagevec.spark.udf.gpus_of_tasks", lambda session: True)
    monkeypatch.setattr("imagevec.spark.udf.is_local", lambda session: False)
    monkeypatch.setattr(
        "imagevec.spark.udf.feature_column", lambda *arguments: asked.append(arguments[3])
    )
    features_udf("content", model=tiny, weights="random")
    features_udf("content", model=tiny, weights="random", precision="float16")
    assert [(plan.backend, plan.execution.device) for plan in asked] == [("torch", "cuda")] * 2


def test_openvino_runs_on_the_cpu_where_tasks_have_gpus(frame, monkeypatch, expected):
    pytest.importorskip("openvino")
    monkeypatch.setattr("imagevec.spark.udf.gpus_of_tasks", lambda session: True)
    df = frame(IMAGES[:2])
    options = {**TINY, "engine": "openvino"}
    found = vectors(df.withColumn("features", features_udf("content", **options)))
    assert_vectors(found, [expected[image] for image in IMAGES[:2]])


def test_process_images_makes_no_plan_again(frame, monkeypatch):
    monkeypatch.setattr("imagevec.spark.sessions.gpus_of_tasks", lambda session: True)
    made = []

    def counted(**options):
        made.append(options)
        return make_plan(**options)

    monkeypatch.setattr("imagevec.spark.vectorizer.make_plan", counted)
    vectorizer = ImageVectorizer(**TINY, device="cpu")
    for _ in range(3):
        vectorizer.process_images(frame(IMAGES[:1]))
    assert len(made) == 1


def test_a_column_is_found_whatever_its_case(frame, expected):
    df = frame(IMAGES[:2]).withColumnRenamed("content", "Content")
    df = ImageVectorizer(**TINY).process_images(df, "content")
    assert_vectors(vectors(df), [expected[image] for image in IMAGES[:2]])


def test_on_error_raise_names_the_path(frame, folder):
    df = frame([str(folder / "d.png")], type="string")
    with pytest.raises(Exception, match=r"unsupported_format: .*d\.png: starts with b'no image'"):
        df.select(features_udf("content", **TINY, on_error="raise")).collect()
