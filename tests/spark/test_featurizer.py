from __future__ import annotations

import gc
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.linalg import DenseVector, VectorUDT
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, FloatType, StructField, StructType
from torch import nn

from imagevec import (
    ImageFeaturizer,
    ImageVectorizer,
    OptionError,
    Preprocessing,
    WeightsError,
    provenance,
    register_model,
)
from imagevec.engines import openvino
from imagevec.files import digest_of
from imagevec.models import saved as saved_model
from imagevec.models.features import FeatureModel
from imagevec.models.registry import find_source
from imagevec.models.source import REGISTERED
from imagevec.options import DEFAULTS
from tests.helpers.clip import built
from tests.helpers.factories import Tiny, tiny
from tests.helpers.images import encode, photo
from tests.helpers.options import WRONG_OPTIONS, option_id
from tests.helpers.pipeline import run_python, saved, write_code
from tests.helpers.spark import Frame

NAME = "tiny for featurizers"
TINY: dict[str, Any] = {"model": NAME, "weights": "random", "engine": "torch"}
IMAGES = [encode(photo(seed=seed)) for seed in range(3)]
MIXED = [IMAGES[0], None, b"garbage", IMAGES[1]]
COLOURS = {0.0: "red", 1.0: "blue"}

# Another value of each param than its default.
VALUES: dict[str, Any] = {
    "inputCol": "photo",
    "outputCol": "vector",
    "outputType": "vector",
    "model": "resnet18",
    "weights": "IMAGENET1K_V1",
    "layer": "logits",
    "inputSize": [160, 96],
    "normalize": True,
    "precision": "bfloat16",
    "engine": "torch",
    "device": "cpu",
    "batchSize": 3,
    "maxPixels": 1000,
    "maxBytes": 5000,
    "formats": ["PNG"],
    "allowedRoots": ["/photos"],
    "readTimeoutSeconds": 30,
    "decode": "scaled",
    "background": "#ffffff",
    "valueRange": [0.0, 4095.0],
    "truncated": "accept",
    "boxes": "boxes",
    "onError": "raise",
    "isolate": True,
}

SESSION = """
from pyspark.sql import SparkSession
spark = (
    SparkSession.builder.master("local[2]")
    .config("spark.driver.host", "127.0.0.1")
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.ui.enabled", "false")
    .config("spark.ui.showConsoleProgress", "false")
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")
"""


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_model(NAME, tiny, preprocessing=Preprocessing(resize_size=32, crop_size=32))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of ``tiny``."""
    path = tmp_path / "original" / "tiny.pth"
    path.parent.mkdir()
    saved(tiny, path)
    return path


@pytest.fixture(scope="module")
def coloured(spark: SparkSession) -> DataFrame:
    """Red and blue photos with the labels 0 and 1, in turns.

    In a session of their own: Spark 4.0 cannot fit a classifier in one that has observed a query.
    """
    labels = [float(i % 2) for i in range(12)]
    rows = [(i, coloured_photo(COLOURS[label], i), label) for i, label in enumerate(labels)]
    df = spark.newSession().createDataFrame(rows, "id int, content binary, label double")
    return df.coalesce(2).cache()


def coloured_photo(colour: str, seed: int) -> bytes:
    image = photo(32, 32, seed)
    return encode(Image.blend(image, Image.new("RGB", image.size, colour), 0.5))


def features(df: DataFrame, column: str = "features") -> list[Any]:
    return [None if row[0] is None else list(row[0]) for row in df.select(column).collect()]


def assert_vectors(ours: list[Any], theirs: list[Any]) -> None:
    assert [vector is None for vector in ours] == [vector is None for vector in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if our is not None:
            np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)


def without_spark(values: Sequence[bytes | None], **options: Any) -> list[Any]:
    vectorizer = ImageVectorizer(**{"engine": "torch", **options})
    return [None if value is None else vectorizer.extract_features(value) for value in values]


def capitalized(name: str) -> str:
    return name[0].upper() + name[1:]


# Params


def test_the_params_are_the_options_in_camel_case() -> None:
    options = {capitalized(option.title().replace("_", "")) for option in DEFAULTS}
    params = {capitalized(param.name) for param in ImageFeaturizer().params}
    assert params == options - {"Output"} | {"InputCol", "OutputCol", "OutputType"}
    assert set(VALUES) == {param.name for param in ImageFeaturizer().params}


def test_the_defaults_are_the_options() -> None:
    featurizer = ImageFeaturizer()
    for option, value in DEFAULTS.items():
        if option != "output":
            name = "".join([option.split("_")[0], *map(str.title, option.split("_")[1:])])
            default = featurizer.getOrDefault(name)
            assert default == (list(value) if isinstance(value, tuple) else value), option
            assert not featurizer.isSet(name)
    columns = (featurizer.getInputCol(), featurizer.getOutputCol(), featurizer.getOutputType())
    assert columns == ("content", "features", "array")


@pytest.mark.parametrize("name", VALUES)
def test_a_param_is_set_in_all_the_ways_there_are(name: str) -> None:
    value = VALUES[name]
    getter, setter = f"get{capitalized(name)}", f"set{capitalized(name)}"
    plain = ImageFeaturizer()
    assert getattr(plain, getter)() != value
    assert getattr(plain, setter)(value) is plain
    by_params = ImageFeaturizer().setParams(**{name: value})
    by_set = ImageFeaturizer()
    by_set.set(by_set.getParam(name), value)
    for featurizer in (plain, by_params, by_set, ImageFeaturizer(**{name: value})):
        assert getattr(featurizer, getter)() == value
        assert featurizer.isSet(name)
        assert [param.name for param in featurizer.params if featurizer.isSet(param)] == [name]


def test_params_are_explained() -> None:
    explained = ImageFeaturizer(layer="logits", model=tiny).explainParams().splitlines()
    assert len(explained) == len(VALUES)
    assert explained.count(
        "precision: lowest precision of the forward pass to accept: float32, bfloat16, float16, "
        "int8 or auto (default: float32)"
    )
    (layer,) = (line for line in explained if line.startswith("layer: "))
    assert layer.endswith("(default: pooled, current: logits)")


def test_only_keywords_are_accepted() -> None:
    untyped: Any = ImageFeaturizer
    with pytest.raises(TypeError):
        untyped("content")


def test_an_unknown_param_is_refused() -> None:
    with pytest.raises(OptionError, match="'batchsize' is not known: did you mean 'batchSize'"):
        ImageFeaturizer(batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="'output'.*'outputCol'"):
        ImageFeaturizer().setParams(output="struct")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 50),
        ("layer", 4),
        ("inputSize", "224"),
        ("inputSize", ["160", 96]),
        ("normalize", "yes"),
        ("batchSize", "many"),
        ("batchSize", 2.5),
        ("maxPixels", "10"),
        ("formats", "PNG"),
        ("allowedRoots", [1]),
        ("isolate", 1),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f'param "{name}"'):
        ImageFeaturizer(**{name: value})  # type: ignore[arg-type]


def test_several_layers_are_refused_with_another_way() -> None:
    with pytest.raises(TypeError, match="is not a single layer: use one featurizer per layer"):
        ImageFeaturizer(layer=("conv", "pooled"))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [64, [64, 96], (64, 96)])
def test_input_size_is_saved(frame: Frame, tmp_path: Path, size: Any) -> None:
    options = {**TINY, "layer": "pooled"}
    featurizer = ImageFeaturizer(**options, inputSize=size)
    expected = without_spark(IMAGES, **options, input_size=size)
    assert_vectors(features(featurizer.transform(frame(IMAGES))), expected)
    featurizer.save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    df = loaded.transform(frame(IMAGES))
    assert_vectors(features(df), expected)
    preprocessing = provenance(df).preprocessing
    assert isinstance(preprocessing, Preprocessing)
    assert preprocessing.input_shape == (64, 64 if size == 64 else 96)


def test_paths_may_be_paths(tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(model=tmp_path, weights=tmp_path / "a.pth")  # type: ignore[arg-type]
    assert featurizer.getModel() == str(tmp_path)
    assert featurizer.getWeights() == str(tmp_path / "a.pth")


def test_a_copy_is_another_one() -> None:
    featurizer = ImageFeaturizer(layer="logits")
    copy = featurizer.copy({featurizer.layer: "conv", featurizer.normalize: True})
    assert (copy.uid, copy.getLayer(), copy.getNormalize()) == (featurizer.uid, "conv", True)
    assert (featurizer.getLayer(), featurizer.getNormalize()) == ("logits", False)
    copy.setFormats(["PNG"])
    assert not featurizer.isSet("formats")


# Transforming


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("model", [NAME, tiny], ids=["name", "factory"])
def test_features_are_those_of_the_vectorizer(
    frame: Frame, engine: str, model: str | Callable[[], nn.Module]
) -> None:
    options: dict[str, Any]
    options = {"model": model, "weights": "random", "engine": engine, "normalize": True}
    df = ImageFeaturizer(**options).transform(frame(MIXED))
    assert df.columns == ["id", "content", "features"]
    assert_vectors(features(df), without_spark(MIXED, **options))


def test_no_job_starts_until_an_action(frame: Frame, jobs_started: Callable[[], int]) -> None:
    df = ImageFeaturizer(**TINY, outputType="vector").transform(frame(IMAGES))
    assert jobs_started() == 0
    assert len(df.collect()) == 3
    assert jobs_started() == 1


def test_params_may_be_given_with_the_data(frame: Frame) -> None:
    featurizer = ImageFeaturizer(**TINY)
    df = featurizer.transform(frame(MIXED), {featurizer.layer: "logits"})
    assert_vectors(features(df), without_spark(MIXED, **TINY, layer="logits"))
    assert_vectors(features(featurizer.transform(frame(MIXED))), without_spark(MIXED, **TINY))


def test_a_changed_param_counts(frame: Frame) -> None:
    featurizer = ImageFeaturizer(**TINY)
    assert len(features(featurizer.transform(frame(IMAGES)))[0]) == 8
    assert len(features(featurizer.setLayer("logits").transform(frame(IMAGES)))[0]) == 5
    featurizer.clear(featurizer.layer)
    assert len(features(featurizer.transform(frame(IMAGES)))[0]) == 8


def test_columns_have_any_names(frame: Frame) -> None:
    df = frame(IMAGES).withColumnRenamed("content", "the.photo")
    for output_type in ("array", "vector"):
        featurizer = ImageFeaturizer(
            **TINY, inputCol="the.photo", outputCol="a`b.c", outputType=output_type
        )
        out = featurizer.transform(df)
        assert out.columns == ["id", "the.photo", "a`b.c"]
        assert_vectors(features(out, "`a``b.c`"), without_spark(IMAGES, **TINY))


def test_vectors_are_null_where_there_is_no_image(frame: Frame) -> None:
    values = [*MIXED, None, b""]
    df = ImageFeaturizer(**TINY, outputType="vector").transform(frame(values))
    vectors = [row.features for row in df.collect()]
    assert {type(vector) for vector in vectors} == {DenseVector, type(None)}
    expected = without_spark(values, **TINY)
    assert_vectors([vector and vector.toArray() for vector in vectors], expected)
    assert df.where("features IS NULL").count() == 4


def test_all_vectors_may_be_null(frame: Frame) -> None:
    df = ImageFeaturizer(**TINY, outputType="vector").transform(frame([None, b"garbage"]))
    assert features(df) == [None, None]


@pytest.mark.parametrize("output_type", ["array", "vector"])
def test_features_are_computed_once(frame: Frame, output_type: str) -> None:
    df = ImageFeaturizer(**TINY, outputType=output_type).transform(frame(MIXED))
    plan = df.select("features", "id")._jdf.queryExecution().optimizedPlan().toString()
    assert plan.count("image_features(") == 1


@pytest.mark.parametrize("output_type", ["array", "vector"])
def test_the_schema_is_known_before(
    frame: Frame, jobs_started: Callable[[], int], output_type: str
) -> None:
    featurizer = ImageFeaturizer(**TINY, outputType=output_type)
    df = frame(IMAGES)
    schema = featurizer.transformSchema(df.schema)
    assert schema == featurizer.transform(df).schema
    assert schema.names == ["id", "content", "features"]
    kind = ArrayType(FloatType()) if output_type == "array" else VectorUDT()
    assert schema["features"].dataType == kind
    assert schema["features"].nullable
    assert jobs_started() == 0


def test_a_vectors_length_is_known_before(frame: Frame) -> None:
    df = ImageFeaturizer(**TINY, outputType="vector").transform(frame(IMAGES))
    assert df.schema["features"].metadata["ml_attr"] == {"num_attrs": 8}


@pytest.mark.parametrize("output_type", ["array", "vector"])
def test_the_column_says_what_made_it(frame: Frame, output_type: str) -> None:
    df = ImageFeaturizer(**TINY, outputType=output_type).transform(frame(IMAGES))
    assert provenance(df) == provenance(ImageVectorizer(**TINY).process_images(frame(IMAGES)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"inputCol": "contnt"}, "there is no column 'contnt': did you mean 'content'"),
        ({"inputCol": "id"}, "column 'id' is of type int: use a column of type binary"),
        ({"outputCol": "content"}, "outputCol='content' is not valid"),
        ({"outputCol": "ID"}, "outputCol='ID' is not valid"),
        ({"outputType": "vectr"}, "outputType='vectr' is not known: did you mean 'vector'"),
        ({"outputType": "struct"}, "outputType='struct' is not known"),
    ],
)
def test_wrong_columns_are_refused_before_a_job_starts(
    frame: Frame, jobs_started: Callable[[], int], params: dict[str, str], message: str
) -> None:
    featurizer = ImageFeaturizer(**{**TINY, **params})
    df = frame(IMAGES)
    for refuse in (lambda: featurizer.transformSchema(df.schema), lambda: featurizer.transform(df)):
        with pytest.raises(OptionError) as refused:
            refuse()
        assert message in str(refused.value)
    assert jobs_started() == 0


@pytest.mark.parametrize(
    ("option", "fix"),
    [wrong for wrong in WRONG_OPTIONS if wrong[0].keys() <= DEFAULTS.keys() - {"output"}],
    ids=option_id,
)
def test_a_wrong_option_is_refused_before_a_job_starts(
    frame: Frame, jobs_started: Callable[[], int], option: dict[str, Any], fix: str
) -> None:
    names = {"batch_size": "batchSize", "max_pixels": "maxPixels", "on_error": "onError"}
    names |= {"max_bytes": "maxBytes", "input_size": "inputSize", "value_range": "valueRange"}
    params = {names.get(name, name): value for name, value in option.items()}
    df = frame(IMAGES)
    with pytest.raises((OptionError, TypeError)) as refused:
        ImageFeaturizer(**{**TINY, "model": "squeezenet1_1", **params}).transform(df)
    assert refused.type is TypeError or fix in str(refused.value)
    assert jobs_started() == 0


def test_transform_schema_needs_no_session() -> None:
    printed = run_python("""
from pyspark.sql.types import BinaryType, StructType
from imagevec import ImageFeaturizer
featurizer = ImageFeaturizer(model="squeezenet1_1", weights="random", outputType="vector")
print(featurizer.transformSchema(StructType().add("content", BinaryType())).simpleString())
""")
    assert printed.strip() == "struct<content:binary,features:vector>"


def test_threads_may_share_one(frame: Frame) -> None:
    featurizer = ImageFeaturizer(**TINY)
    df = frame(MIXED)
    found: list[list[Any]] = []
    threads = [
        threading.Thread(target=lambda: found.append(features(featurizer.transform(df))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4
    for vectors in found:
        assert_vectors(vectors, without_spark(MIXED, **TINY))


# Pipelines


def test_a_classifier_follows(coloured: DataFrame) -> None:
    stages: list[Any] = [ImageFeaturizer(**TINY, outputType="vector"), LogisticRegression()]
    model: Any = Pipeline(stages=stages).fit(coloured)
    rows = model.transform(coloured).select("label", "prediction").collect()
    assert len(rows) == 12
    assert [row.prediction for row in rows] == [row.label for row in rows]
    assert model.stages[1].numFeatures == 8


def test_a_pipeline_may_be_fitted_with_params(coloured: DataFrame) -> None:
    featurizer = ImageFeaturizer(**TINY, outputType="vector")
    pipeline = Pipeline(stages=[featurizer, LogisticRegression(maxIter=3)])
    fitted: list[Any] = pipeline.fit(coloured, [{}, {featurizer.layer: "logits"}])
    wide, narrow = fitted
    assert (wide.stages[1].numFeatures, narrow.stages[1].numFeatures) == (8, 5)


@pytest.fixture(scope="module")
def chosen(coloured: DataFrame) -> CrossValidatorModel:
    featurizer = ImageFeaturizer(**TINY, outputType="vector")
    classifier = LogisticRegression(maxIter=20)
    grid = (
        ParamGridBuilder()
        .addGrid(featurizer.layer, ["pooled", "logits"])
        .addGrid(classifier.regParam, [0.0])
        .build()
    )
    validator = CrossValidator(
        estimator=Pipeline(stages=[featurizer, classifier]),
        estimatorParamMaps=grid,
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=2,
        seed=1,
        parallelism=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its pool of threads open
        model = validator.fit(coloured)
        gc.collect()
    return model


def test_cross_validation_chooses_its_params(
    chosen: CrossValidatorModel, coloured: DataFrame
) -> None:
    assert len(chosen.avgMetrics) == 2
    assert max(chosen.avgMetrics) >= 0.75
    best_model: Any = chosen.bestModel
    featurizer, classifier = best_model.stages
    best = ["pooled", "logits"][int(np.argmax(chosen.avgMetrics))]
    assert featurizer.getLayer() == best
    assert classifier.numFeatures == {"pooled": 8, "logits": 5}[best]
    rows = chosen.transform(coloured).select("label", "prediction").collect()
    assert [row.prediction for row in rows] == [row.label for row in rows]


def test_a_chosen_model_can_be_saved(
    chosen: CrossValidatorModel, coloured: DataFrame, tmp_path: Path
) -> None:
    chosen.save(str(tmp_path / "chosen"))
    loaded = CrossValidatorModel.load(str(tmp_path / "chosen"))
    best_models: list[Any] = [loaded.bestModel, chosen.bestModel]
    loaded_layer, layer = (model.stages[0].getLayer() for model in best_models)
    assert loaded_layer == layer
    ours, theirs = (
        [row.prediction for row in model.transform(coloured).collect()]
        for model in (loaded, chosen)
    )
    assert ours == theirs


# Saving and loading


def files_in(folder: Path) -> list[Path]:
    """What was saved beside the metadata."""
    return sorted(path for path in (folder / "files").rglob("*") if path.is_file())


def test_all_params_are_saved(spark: SparkSession, tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(**VALUES)
    featurizer.save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert loaded.uid == featurizer.uid
    assert {param.name: loaded.getOrDefault(param) for param in loaded.params} == VALUES
    assert not (tmp_path / "saved" / "files").exists()  # names alone


def test_defaults_are_saved_as_defaults(spark: SparkSession, tmp_path: Path) -> None:
    ImageFeaturizer().save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert loaded.extractParamMap() == {
        loaded.getParam(name): value
        for name, value in {
            param.name: ImageFeaturizer().getOrDefault(param.name) for param in loaded.params
        }.items()
    }
    assert not any(loaded.isSet(param) for param in loaded.params)


def test_the_defaults_of_the_day_hold(frame: Frame, tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(**TINY)
    featurizer._setDefault(layer="logits")  # as if it had been the default then
    featurizer.save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert not loaded.isSet("layer")
    assert len(features(loaded.transform(frame(IMAGES)))[0]) == 5


@pytest.mark.parametrize("as_uri", [False, True], ids=["path", "uri"])
def test_weights_go_along(frame: Frame, weights: Path, tmp_path: Path, as_uri: bool) -> None:
    featurizer = ImageFeaturizer(model=NAME, weights=str(weights), engine="torch")
    expected = without_spark(MIXED, model=NAME, weights=str(weights))
    digest = digest_of(weights)
    folder = tmp_path / "é 100%25 [saved]"
    place = f"file://{folder}" if as_uri else str(folder)
    featurizer.save(place)
    assert [path.name for path in files_in(folder)] == [f"imagevec-{digest}.pth"]
    shutil.rmtree(weights.parent)
    loaded = ImageFeaturizer.load(place)
    shutil.rmtree(folder)
    assert_vectors(features(loaded.transform(frame(MIXED))), expected)
    assert_vectors(features(featurizer.transform(frame(MIXED[:0]))), [])


@pytest.fixture
def mount(spark: SparkSession, tmp_path: Path) -> Iterator[str]:
    """The URI of a file system that only Spark can read, with a folder ``data``."""
    (tmp_path / "mounted").mkdir()
    name = tmp_path.name.replace("_", "")  # Hadoop keeps a client for each name
    settings = spark.sparkContext._jsc.hadoopConfiguration()
    default = settings.get("fs.defaultFS")
    link = f"fs.viewfs.mounttable.{name}.link./data"
    settings.set(link, (tmp_path / "mounted").as_uri())
    yield f"viewfs://{name}"
    settings.unset(link)
    settings.set("fs.defaultFS", default)


def test_names_are_saved_in_any_file_system_of_spark(
    spark: SparkSession, mount: str, tmp_path: Path
) -> None:
    ImageFeaturizer(layer="logits").save(f"{mount}/data/saved")
    assert ImageFeaturizer.load(f"{mount}/data/saved").getLayer() == "logits"
    assert (tmp_path / "mounted" / "saved" / "metadata").is_dir()


def test_files_need_a_store_of_this_process(spark: SparkSession, mount: str, weights: Path) -> None:
    place = f"{mount}/data/saved"
    ImageFeaturizer(layer="logits").save(place)
    featurizer = ImageFeaturizer(model=NAME, weights=str(weights), engine="torch")
    with pytest.raises(OptionError, match=f"{place} cannot contain weights.* not supported"):
        featurizer.write().overwrite().save(place)
    assert ImageFeaturizer.load(place).getLayer() == "logits"


def test_a_path_is_in_the_file_system_of_spark(
    spark: SparkSession, mount: str, weights: Path
) -> None:
    """Stages of a pipeline get the same kind of path as the pipeline."""
    spark.sparkContext._jsc.hadoopConfiguration().set("fs.defaultFS", f"{mount}/")
    featurizer = ImageFeaturizer(model=NAME, weights=str(weights), engine="torch")
    with pytest.raises(OptionError, match=f"{mount}/data/saved cannot contain weights"):
        featurizer.save("/data/saved")


def test_a_loaded_one_can_be_saved_again(frame: Frame, weights: Path, tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(model=NAME, weights=str(weights), engine="torch")
    expected = without_spark(MIXED, model=NAME, weights=str(weights))
    place = str(tmp_path / "saved")
    featurizer.save(place)
    ImageFeaturizer.load(place).write().overwrite().save(place)  # over its own origin
    assert_vectors(features(ImageFeaturizer.load(place).transform(frame(MIXED))), expected)


def test_nothing_is_written_over_unasked(spark: SparkSession, tmp_path: Path) -> None:
    place = str(tmp_path / "saved")
    ImageFeaturizer(layer="logits").save(place)
    with pytest.raises(Exception, match="(?i)exists"):
        ImageFeaturizer().save(place)
    assert ImageFeaturizer.load(place).getLayer() == "logits"
    ImageFeaturizer().write().overwrite().save(place)
    assert ImageFeaturizer.load(place).getLayer() == "pooled"


def test_weights_that_a_registered_factory_draws_go_along(frame: Frame, tmp_path: Path) -> None:
    register_model("unseeded tiny for featurizers", lambda: Tiny())
    featurizer = ImageFeaturizer(model="unseeded tiny for featurizers", engine="torch")
    first = features(featurizer.transform(frame(MIXED)))
    assert_vectors(features(featurizer.transform(frame(MIXED))), first)
    featurizer.save(str(tmp_path / "saved"))
    (file,) = files_in(tmp_path / "saved")
    assert file.suffix == ".safetensors"
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert_vectors(features(loaded.transform(frame(MIXED))), first)


def test_what_is_saved_is_what_was_used(frame: Frame, weights: Path, tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(model=NAME, weights=str(weights), engine="torch")
    first = features(featurizer.transform(frame(MIXED)))
    saved(tiny, weights, seed=5)
    featurizer.save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert_vectors(features(loaded.transform(frame(MIXED))), first)


@pytest.mark.parametrize(
    ("model", "weights", "error", "message"),
    [
        (tiny, "random", OptionError, "register_model.*saved model"),
        (NAME, "no/such.pth", WeightsError, "no such file"),
    ],
    ids=["a_factory", "missing_weights"],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_overwritten(
    spark: SparkSession, tmp_path: Path, model: Any, weights: str, error: Any, message: str
) -> None:
    place = str(tmp_path / "saved")
    ImageFeaturizer(layer="logits").save(place)
    with pytest.raises(error, match=message):
        ImageFeaturizer(model=model, weights=weights).write().overwrite().save(place)
    assert ImageFeaturizer.load(place).getLayer() == "logits"


def test_a_model_of_open_clip_is_saved(clip: Any, frame: Frame, tmp_path: Path) -> None:
    name = "open_clip/tiny-vit"
    weights = tmp_path / "weights.pt"
    torch.save(built(clip, name).state_dict(), weights)
    images = frame([encode(photo(64, 64))])
    featurizer = ImageFeaturizer(model=name, weights=str(weights))
    featurizer.save(str(tmp_path / "saved"))
    loaded = ImageFeaturizer.load(str(tmp_path / "saved"))
    assert loaded.transform(images).collect() == featurizer.transform(images).collect()
    (tmp_path / "open_clip_config.json").write_text('{"preprocess_cfg": {"mean": [0, 0, 0]}}')
    with pytest.raises(OptionError, match="the model also reads open_clip_config.json next to"):
        featurizer.save(str(tmp_path / "again"))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A saved model of ``tiny``, float32."""
    pytest.importorskip("openvino")
    model = FeatureModel(find_source(NAME), weights="random", layer="logits", normalize=False)
    spec = model.spec
    folder = tmp_path / "original"
    folder.mkdir()
    files = openvino.save(openvino.convert(model), folder)
    saved_model.write(folder, spec, "openvino", files)
    return folder


def test_a_saved_model_goes_along(frame: Frame, model_folder: Path, tmp_path: Path) -> None:
    featurizer = ImageFeaturizer(model=str(model_folder))
    expected = without_spark(MIXED, **{**TINY, "layer": "logits"})
    assert_vectors(features(featurizer.transform(frame(MIXED))), expected)
    place = str(tmp_path / "saved")
    featurizer.save(place)
    assert {path.name for path in files_in(tmp_path / "saved")} == {
        "spec.json",
        "model.xml",
        "model.bin",
    }
    shutil.rmtree(model_folder)
    loaded = ImageFeaturizer.load(place)
    again = ImageFeaturizer.load(place)
    assert loaded.getModel() == again.getModel()
    shutil.rmtree(place)
    assert_vectors(features(loaded.transform(frame(MIXED))), expected)


@pytest.mark.parametrize("name", ["..", "../model.xml", "/etc/passwd", "a/../..", ""])
def test_saved_model_does_not_name_files_elsewhere(model_folder: Path, name: str) -> None:
    spec_file = model_folder / "spec.json"
    content = json.loads(spec_file.read_text())
    content["files"] = {name: "0" * 64, **content["files"]}
    spec_file.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=f"{name!r} is not a file name"):
        saved_model.file_names(model_folder)
    with pytest.raises(WeightsError, match=f"{name!r} is not a file name"):
        saved_model.read(model_folder)


@pytest.mark.parametrize("name", ["spec.json", "model.xml", "model.bin"])
def test_a_saved_model_that_was_altered_is_refused(
    spark: SparkSession, model_folder: Path, tmp_path: Path, name: str
) -> None:
    ImageFeaturizer(model=str(model_folder)).save(str(tmp_path / "saved"))
    (file,) = (path for path in files_in(tmp_path / "saved") if path.name == name)
    before = digest_of(file)
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(WeightsError) as refused:
        ImageFeaturizer.load(str(tmp_path / "saved"))
    for part in (name, before, digest_of(file)):
        assert part in str(refused.value)


def test_a_damaged_copy_in_the_cache_is_replaced(
    frame: Frame, model_folder: Path, tmp_path: Path
) -> None:
    place = str(tmp_path / "saved")
    ImageFeaturizer(model=str(model_folder)).save(place)
    (Path(str(ImageFeaturizer.load(place).getModel())) / "model.bin").write_bytes(b"damaged")
    vectors = features(ImageFeaturizer.load(place).transform(frame(MIXED)))
    assert_vectors(vectors, without_spark(MIXED, **{**TINY, "layer": "logits"}))


@pytest.fixture
def place(spark: SparkSession, weights: Path, tmp_path: Path) -> Path:
    """A saved featurizer with weights of its own."""
    folder = tmp_path / "saved"
    ImageFeaturizer(model=NAME, weights=str(weights), engine="torch").save(str(folder))
    return folder


def test_weights_that_were_altered_are_refused(place: Path) -> None:
    (file,) = files_in(place)
    before = digest_of(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        torch.save(Tiny().state_dict(), file)
    with pytest.raises(WeightsError) as refused:
        ImageFeaturizer.load(str(place))
    assert before in str(refused.value)
    assert digest_of(file) in str(refused.value)


def test_weights_that_are_missing_are_refused(place: Path) -> None:
    (file,) = files_in(place)
    file.unlink()
    with pytest.raises(WeightsError, match=f"{file.name} does not exist"):
        ImageFeaturizer.load(str(place))


def rewrite_metadata(place: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    (part,) = (place / "metadata").glob("part-*")
    content = json.loads(part.read_text())
    edit(content)
    part.write_text(json.dumps(content) + "\n")
    for checksum in (place / "metadata").glob(".part-*.crc"):
        checksum.unlink()


@pytest.mark.parametrize("name", ["../../original/tiny.pth", "/etc/other.pth", "imagevec-0.pth"])
def test_weights_elsewhere_are_refused(place: Path, name: str) -> None:
    rewrite_metadata(place, lambda content: content["paramMap"].update(weights=name))
    with pytest.raises(WeightsError, match="is not the name of a saved file"):
        ImageFeaturizer.load(str(place))


@pytest.mark.parametrize(
    "model", ["{}/_m.pt2", "_m.pt2", "factory:os.getcwd", "{}", "timm/local-dir:{}", "~/m", "here"]
)
def test_model_that_is_not_a_name_is_not_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_code(tmp_path / "_m.pt2", marker := tmp_path / "marker")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "spec.json").write_text("{}")
    rewrite_metadata(
        place,
        lambda content: content["paramMap"].update(model=model.format(tmp_path), weights="DEFAULT"),
    )
    schema = StructType([StructField("content", BinaryType())])
    with pytest.raises(OptionError, match="is not a name"):
        ImageFeaturizer.load(str(place)).transformSchema(schema)
    assert not marker.exists()


def test_another_class_is_not_loaded(place: Path) -> None:
    rewrite_metadata(place, lambda content: content.update({"class": "os.getcwd"}))
    with pytest.raises(OptionError, match=r"contains a os\.getcwd"):
        ImageFeaturizer.load(str(place))


def test_no_code_is_saved(place: Path) -> None:
    names = [path.name for path in place.rglob("*") if path.is_file()]
    kinds = {Path(name).suffix for name in names if not name.startswith((".", "part-", "_"))}
    assert kinds == {".pth"}  # read with weights_only=True


def test_a_new_process_loads_them(
    frame: Frame, coloured: DataFrame, weights: Path, tmp_path: Path
) -> None:
    """A featurizer with a model of torchvision, and a pipeline with a registered one."""
    from torchvision.models import squeezenet1_1

    path = tmp_path / "weights.pth"
    saved(squeezenet1_1, path)
    options: dict[str, Any]
    options = {"model": "squeezenet1_1", "weights": str(path), "engine": "torch"}
    expected = without_spark(IMAGES[:2], **options)
    ImageFeaturizer(**options, outputType="vector").save(str(tmp_path / "saved"))
    path.unlink()
    frame(IMAGES[:2]).write.parquet(str(tmp_path / "images"))

    featurizer = ImageFeaturizer(
        model=NAME, weights=str(weights), engine="torch", outputType="vector"
    )
    model = Pipeline(stages=[featurizer, LogisticRegression()]).fit(coloured)
    columns = ["id", "probability", "prediction"]
    rows = model.transform(coloured).select(*columns).orderBy("id").collect()
    model.save(str(tmp_path / "model"))
    weights.unlink()
    here = PipelineModel.load(str(tmp_path / "model"))
    assert [stage.uid for stage in here.stages] == [stage.uid for stage in model.stages]
    coloured.write.parquet(str(tmp_path / "coloured"))

    printed = run_python(f"""{SESSION}
import json
from imagevec import ImageFeaturizer, Preprocessing, register_model
from pyspark.ml import PipelineModel
from tests.helpers.factories import tiny
featurizer = ImageFeaturizer.load({str(tmp_path / "saved")!r})
images = spark.read.parquet({str(tmp_path / "images")!r})
rows = featurizer.transform(images).orderBy("id").collect()
print(json.dumps([row.features.tolist() for row in rows]))

register_model({NAME!r}, tiny, preprocessing=Preprocessing(resize_size=32, crop_size=32))
coloured = spark.read.parquet({str(tmp_path / "coloured")!r})
predicted = PipelineModel.load({str(tmp_path / "model")!r}).transform(coloured)
rows = predicted.select({columns}).orderBy("id").collect()
print(json.dumps([[row.id, row.probability.tolist(), row.prediction] for row in rows]))
""")
    vectors, loaded = map(json.loads, printed.splitlines())
    assert_vectors(vectors, expected)
    assert [row[0] for row in loaded] == [row.id for row in rows]
    np.testing.assert_allclose([row[1] for row in loaded], [list(r.probability) for r in rows])
    assert [row[2] for row in loaded] == [row.prediction for row in rows]


def test_an_unfitted_pipeline_is_saved_too(
    coloured: DataFrame, weights: Path, tmp_path: Path
) -> None:
    featurizer = ImageFeaturizer(
        model=NAME, weights=str(weights), engine="torch", outputType="vector"
    )
    Pipeline(stages=[featurizer, LogisticRegression()]).save(str(tmp_path / "pipeline"))
    weights.unlink()
    model = Pipeline.load(str(tmp_path / "pipeline")).fit(coloured)
    rows = model.transform(coloured).select("label", "prediction").collect()
    assert [row.prediction for row in rows] == [row.label for row in rows]


def test_a_registered_model_has_to_be_registered(
    spark: SparkSession, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = ImageFeaturizer.load(str(place))
    monkeypatch.delitem(REGISTERED, NAME)
    schema = StructType([StructField("content", BinaryType())])
    with pytest.raises(OptionError, match=f"model='{NAME}' is not known"):
        loaded.transformSchema(schema)


def test_functions_of_spark_still_take_the_column(frame: Frame) -> None:
    df = ImageFeaturizer(**TINY).transform(frame(IMAGES))
    assert df.select(F.size("features")).collect() == [(8,)] * len(IMAGES)
