"""``ImageFeaturizer``: feature vectors as a stage of a ``pyspark.ml`` pipeline."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from pyspark.ml import Transformer
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import VectorUDT
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCol, HasOutputCol
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import col, when
from pyspark.sql.types import ArrayType, FloatType, StructField, StructType

from imagevec.engines import saved_model
from imagevec.engines.saved_model import MODEL_FILES, SPEC_FILE, is_saved_model
from imagevec.errors import ImageVecError, OptionError, WeightsError, did_you_mean
from imagevec.files import cache_dir, content_addressed, digest_of, verified
from imagevec.models.exported import is_exported
from imagevec.models.registry import FactoryEntry, ModelFactory, find_entry
from imagevec.models.state_dict import RANDOM, SUFFIXES, find_weights
from imagevec.spark.udf import check_input_column
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.spec import DEFAULTS, FeatureSpec, Options, check_choice
from imagevec.table.provenance import metadata_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_OUTPUT_TYPES = ("array", "vector")
_FILES = "files"  # the folder of what is saved beside the metadata
_SAVED_NAME = re.compile(r"imagevec-[0-9a-f]{64}(\.\w+)?")


def _camel(option: str) -> str:
    first, *others = option.split("_")
    return first + "".join(word.capitalize() for word in others)


_OPTION_OF = {_camel(option): option for option in DEFAULTS if option != "output"}
_DEFAULTS: dict[str, Any] = {
    "inputCol": "content",
    "outputCol": "features",
    "outputType": "array",
    **{
        name: list(value) if isinstance(value := dict(DEFAULTS)[option], tuple) else value
        for name, option in _OPTION_OF.items()
    },
}


class FeaturizerParams(TypedDict, total=False):
    """The keyword arguments of ``ImageFeaturizer``.

    ``inputCol``, ``outputCol`` and ``outputType`` (``"array"`` or ``"vector"``) are its own, all
    others are those of ``imagevec.spec.Options`` in camelCase.
    """

    inputCol: str
    outputCol: str
    outputType: str
    model: str | ModelFactory
    weights: str
    layer: str
    normalize: bool
    precision: str
    engine: str
    device: str
    batchSize: int | str
    maxPixels: int
    formats: list[str]
    allowedRoots: list[str]
    decode: str
    onError: str
    isolate: bool


def _to_model(value: Any) -> Any:
    if callable(value):
        return value
    return _to_path(value)


def _to_path(value: Any) -> str:
    return TypeConverters.toString(str(value) if isinstance(value, Path) else value)


def _to_batch_size(value: Any) -> int | str:
    return "auto" if value == "auto" else TypeConverters.toInt(value)


def _length_of_vectors(spec: FeatureSpec) -> dict[str, Any]:
    """Metadata of an ML column: estimators need not run the model to count the features."""
    return {"ml_attr": {"num_attrs": spec.num_features}}  # one layer's: the Param is one name


def _param(
    name: str, doc: str, converter: Callable[[Any], Any] = TypeConverters.toString
) -> Param[Any]:
    return Param(Params._dummy(), name, doc, converter)


class _Resolved(NamedTuple):
    """What a featurizer's options came to.

    Attributes:
        options: As they were set.
        weights: A content-addressed copy of one's own weights; ``None`` for a library's.
        vectorizer: Of these.
    """

    options: Options
    weights: Path | None
    vectorizer: ImageVectorizer


class ImageFeaturizer(
    Transformer, HasInputCol, HasOutputCol, MLReadable["ImageFeaturizer"], MLWritable
):
    """A ``pyspark.ml`` Transformer from a column of images to a column of feature vectors.

        featurizer = ImageFeaturizer(model="resnet50", outputType="vector")
        model = Pipeline(stages=[featurizer, LogisticRegression()]).fit(photos)

    Params of a wrong type are refused when they are set, wrong values before a job starts, by
    ``transformSchema``. A null or bad image gives a null, which most estimators do not accept:
    drop these rows in a stage between, or set ``onError="raise"``.

    ``save`` works where Spark saves: local paths, and URIs of Hadoop file systems. Beside the
    metadata goes what only this machine has, named by its SHA-256 and verified by ``load``: a
    weights file, the weights that a registered model's factory built, a saved model's folder. Names
    of torchvision's and timm's models and weights are saved as names, and mean what they mean to
    the versions installed where they are loaded. Nothing in the folder is code: a registered model
    has to be registered before the loaded featurizer is used, and a featurizer with a bare factory
    cannot be saved. Under Spark Connect only names are saved.

    Args:
        **params: See ``FeaturizerParams``.

    Raises:
        OptionError: There is no param of that name.
        TypeError: A value is of a wrong type.
    """

    model: Param[Any] = _param(
        "model",
        "a name of list_models(), timm/<name>, a zero-argument factory of an nn.Module, "
        "or the folder of a saved model",
        _to_model,
    )
    weights: Param[str] = _param(
        "weights",
        "a torchvision weights name, a path to .pth, .pt or .safetensors, or random",
        _to_path,
    )
    layer: Param[str] = _param("layer", "pooled, logits, or the name of a node of the model")
    normalize: Param[bool] = _param(
        "normalize", "whether each vector gets length 1", TypeConverters.toBoolean
    )
    precision: Param[str] = _param("precision", "float32, bfloat16, float16, int8 or auto")
    engine: Param[str] = _param("engine", "what runs the forward pass: torch, openvino or auto")
    device: Param[str] = _param("device", "cpu, cuda, cuda:N or auto")
    batchSize: Param[int | str] = _param(
        "batchSize", "images in one forward pass, or auto", _to_batch_size
    )
    maxPixels: Param[int] = _param(
        "maxPixels", "a larger image is a bad image, by its header", TypeConverters.toInt
    )
    formats: Param[list[str]] = _param(
        "formats", "the formats that are decoded", TypeConverters.toListString
    )
    allowedRoots: Param[list[str]] = _param(
        "allowedRoots",
        "folders and prefixes of URIs under which paths are read; none: anywhere",
        TypeConverters.toListString,
    )
    decode: Param[str] = _param("decode", "exact, or scaled, which is faster for large JPEGs")
    onError: Param[str] = _param("onError", "a bad image gives a null, or raises its reason")
    isolate: Param[bool] = _param(
        "isolate", "whether images are decoded in a child process", TypeConverters.toBoolean
    )
    outputType: Param[str] = _param("outputType", "array (of float), or vector (of pyspark.ml)")

    def __init__(self, **params: Unpack[FeaturizerParams]) -> None:
        super().__init__()
        self._resolved: _Resolved | None = None
        self._setDefault(**_DEFAULTS)
        self.setParams(**params)

    def setParams(self, **params: Unpack[FeaturizerParams]) -> Self:
        """Sets the given params, and leaves the others."""
        for name in params.keys() - _DEFAULTS.keys():
            raise OptionError(f"the param {name!r} is not known: {did_you_mean(name, _DEFAULTS)}")
        return self._set(**params)

    def transformSchema(self, schema: StructType) -> StructType:
        """The schema with the output column, after all that is checked before a job starts.

        Raises:
            OptionError: The input column is missing or of another type, the output column exists
                already (in whatever case), or an option is wrong.
            WeightsError: The weights cannot be had, or do not fit the model.
        """
        check_input_column(schema, self.getInputCol())
        name = self.getOutputCol()
        if name.lower() in (existing.lower() for existing in schema.names):
            raise OptionError(f"outputCol={name!r} is not valid: there is such a column already")
        check_choice("outputType", self.getOutputType(), _OUTPUT_TYPES)
        spec = self._resolve().vectorizer.spec
        metadata = metadata_of(spec)
        if self.getOutputType() == "array":
            field = StructField(name, ArrayType(FloatType()), True, metadata)
        else:
            metadata |= _length_of_vectors(spec)
            field = StructField(name, VectorUDT(), True, metadata)
        return StructType([*schema.fields, field])

    def _transform(self, dataset: DataFrame) -> DataFrame:
        self.transformSchema(dataset.schema)
        vectorizer, name = self._resolve().vectorizer, self.getOutputCol()
        df = vectorizer.process_images(dataset, self.getInputCol(), name)
        if self.getOutputType() == "array":
            return df
        features = col("`" + name.replace("`", "``") + "`")
        vectors = when(features.isNotNull(), array_to_vector(features))  # which fails on a null
        metadata = df.schema[name].metadata | _length_of_vectors(vectorizer.spec)
        return df.withColumn(name, vectors.alias(name, metadata=metadata))

    def _resolve(self) -> _Resolved:
        """Loads and checks the model, when first needed after its options were set.

        The weights stay what they are then, even if their file changes or a factory would draw
        others the next time: what follows in a pipeline was fitted to them.
        """
        options = self._options()
        if self._resolved is None or self._resolved.options != options:
            weights = None
            if self._has_own_weights():
                path = find_weights(self.getWeights(), find_entry(self.getModel()))
                weights = content_addressed(path) if path else None
            exact: Options = {**options, "weights": str(weights)} if weights else options
            self._resolved = _Resolved(options, weights, ImageVectorizer(**exact))
        return self._resolved

    def _options(self) -> Options:
        """What was set, and what was the default where it was saved and is not here.

        The other defaults are left to ``resolve``: a saved model has its own.
        """
        return cast(
            Options,
            {
                option: self.getOrDefault(name)
                for name, option in _OPTION_OF.items()
                if self.isSet(name) or self.getOrDefault(name) != _DEFAULTS[name]
            },
        )

    def _has_own_weights(self) -> bool:
        """Whether the weights are no library's, but a file's, or what a factory builds."""
        model, weights = self.getModel(), self.getWeights()
        if is_saved_model(model) or weights == RANDOM:
            return False
        return str(weights).endswith(SUFFIXES) or isinstance(find_entry(model), FactoryEntry)

    def write(self) -> MLWriter:
        """What saves it: ``featurizer.write().overwrite().save(path)`` for example.

        Raises:
            OptionError: The model is a factory.
            WeightsError: The weights file or the saved model cannot be read.
        """
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader[ImageFeaturizer]:
        """What loads it: ``load(path)`` is short for ``read().load(path)``."""
        return _Reader()

    def setInputCol(self, value: str) -> Self:
        return self._set(inputCol=value)

    def setOutputCol(self, value: str) -> Self:
        return self._set(outputCol=value)

    def setOutputType(self, value: str) -> Self:
        return self._set(outputType=value)

    def getOutputType(self) -> str:
        return self.getOrDefault(self.outputType)

    def setModel(self, value: str | ModelFactory) -> Self:
        return self._set(model=value)

    def getModel(self) -> str | ModelFactory:
        return cast("str | ModelFactory", self.getOrDefault(self.model))

    def setWeights(self, value: str) -> Self:
        return self._set(weights=value)

    def getWeights(self) -> str:
        return self.getOrDefault(self.weights)

    def setLayer(self, value: str) -> Self:
        return self._set(layer=value)

    def getLayer(self) -> str:
        return self.getOrDefault(self.layer)

    def setNormalize(self, value: bool) -> Self:
        return self._set(normalize=value)

    def getNormalize(self) -> bool:
        return self.getOrDefault(self.normalize)

    def setPrecision(self, value: str) -> Self:
        return self._set(precision=value)

    def getPrecision(self) -> str:
        return self.getOrDefault(self.precision)

    def setEngine(self, value: str) -> Self:
        return self._set(engine=value)

    def getEngine(self) -> str:
        return self.getOrDefault(self.engine)

    def setDevice(self, value: str) -> Self:
        return self._set(device=value)

    def getDevice(self) -> str:
        return self.getOrDefault(self.device)

    def setBatchSize(self, value: int | str) -> Self:
        return self._set(batchSize=value)

    def getBatchSize(self) -> int | str:
        return self.getOrDefault(self.batchSize)

    def setMaxPixels(self, value: int) -> Self:
        return self._set(maxPixels=value)

    def getMaxPixels(self) -> int:
        return self.getOrDefault(self.maxPixels)

    def setFormats(self, value: list[str]) -> Self:
        return self._set(formats=value)

    def getFormats(self) -> list[str]:
        return self.getOrDefault(self.formats)

    def setAllowedRoots(self, value: list[str]) -> Self:
        return self._set(allowedRoots=value)

    def getAllowedRoots(self) -> list[str]:
        return self.getOrDefault(self.allowedRoots)

    def setDecode(self, value: str) -> Self:
        return self._set(decode=value)

    def getDecode(self) -> str:
        return self.getOrDefault(self.decode)

    def setOnError(self, value: str) -> Self:
        return self._set(onError=value)

    def getOnError(self) -> str:
        return self.getOrDefault(self.onError)

    def setIsolate(self, value: bool) -> Self:
        return self._set(isolate=value)

    def getIsolate(self) -> bool:
        return self.getOrDefault(self.isolate)


class _Writer(MLWriter):
    """Saves a featurizer; what cannot be saved is refused before anything is overwritten."""

    def __init__(self, featurizer: ImageFeaturizer) -> None:
        super().__init__()
        model = featurizer.getModel()
        self._saved = featurizer.copy()
        self._files: dict[str, Path] = {}  # the name in the folder of files, and what goes there
        if is_saved_model(model):
            folder = Path(str(model))
            _, model_files = saved_model.read(folder)
            spec_file = content_addressed(folder / SPEC_FILE)
            names = (f"{spec_file.stem}/{name}" for name in (SPEC_FILE, *MODEL_FILES))
            self._files = dict(zip(names, (spec_file, *model_files), strict=True))
            self._saved.setModel(spec_file.stem)
        elif is_exported(model):
            raise OptionError(
                f"a featurizer with model={model!r} cannot be saved: it can hold code"
            )
        elif not isinstance(model, str):
            raise OptionError(
                f"a featurizer with a factory, model={model!r}, cannot be saved, since to load it "
                "would be to run saved code: give the factory a name with register_model and that "
                "name as model, or give the folder of a saved model"
            )
        elif featurizer._has_own_weights():
            weights = cast(Path, featurizer._resolve().weights)
            self._files = {weights.name: weights}
            self._saved.setWeights(weights.name)

    def saveImpl(self, path: str) -> None:
        session = self.sparkSession
        if self._files:
            _check_has_jvm(session)
        DefaultParamsWriter(self._saved).session(session).saveImpl(path)
        for name, file in self._files.items():
            _copy(session, f"file://{file.resolve()}", f"{path}/{_FILES}/{name}")


class _Reader(MLReader[ImageFeaturizer]):
    """Loads a featurizer; its files are verified, and copied to the user's cache."""

    def load(self, path: str) -> ImageFeaturizer:
        """The featurizer that was saved.

        Raises:
            OptionError: The folder holds something else.
            WeightsError: A file is missing or was altered; the message names both digests.
        """
        session = self.sparkSession
        # Spark 3.5 reads metadata by the context, Spark 4 by either, Spark Connect has none.
        reads = session.sparkContext if hasattr(session, "_jsc") else session
        metadata = DefaultParamsReader.loadMetadata(path, reads)
        expected = f"{ImageFeaturizer.__module__}.{ImageFeaturizer.__qualname__}"
        if metadata["class"] != expected:
            raise OptionError(f"{path} holds a {metadata['class']}, not an {expected}")
        featurizer = ImageFeaturizer()._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(featurizer, metadata)
        model, weights = featurizer.getModel(), featurizer.getWeights()
        if _SAVED_NAME.fullmatch(str(model)):
            featurizer.setModel(str(_load_saved_model(session, path, str(model))))
        elif weights.endswith(SUFFIXES):
            featurizer.setWeights(str(_load_weights(session, path, weights)))
        return featurizer


def _load_weights(session: SparkSession, folder: str, name: str) -> Path:
    """A saved featurizer's weights file, in the user's cache."""
    if not _SAVED_NAME.fullmatch(name):
        raise WeightsError(f"weights={name!r} in {folder} is not the name of a saved file")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / name
        _copy(session, f"{folder}/{_FILES}/{name}", f"file://{copy}")
        return content_addressed(verified(copy))


def _load_saved_model(session: SparkSession, folder: str, name: str) -> Path:
    """A saved featurizer's saved model, in the user's cache; its name is its spec's digest."""
    cached = cache_dir("saved_models") / name
    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
        copy = Path(temporary) / name
        for file in (SPEC_FILE, *MODEL_FILES):
            _copy(session, f"{folder}/{_FILES}/{name}/{file}", f"file://{copy / file}")
        found, expected = digest_of(copy / SPEC_FILE), name.rpartition("-")[2]
        if found != expected:
            raise WeightsError(
                f"{folder}/{_FILES}/{name}/{SPEC_FILE} was altered: "
                f"its SHA-256 is {found}, not {expected}"
            )
        saved_model.read(copy)
        try:
            saved_model.read(cached)
        except WeightsError:  # not there, or damaged
            shutil.rmtree(cached, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first
                copy.rename(cached)
    return cached


def _check_has_jvm(session: SparkSession) -> None:
    if not hasattr(session, "_jsc"):
        raise ImageVecError(
            "Spark Connect has no access to Hadoop's file systems: save and load a featurizer "
            "with weights or a saved model of its own in a classic session"
        )


def _copy(session: SparkSession, source: str, target: str) -> None:
    """Copies a file from and to where the session's Hadoop file systems reach.

    Raises:
        WeightsError: There is no such file.
        ImageVecError: Under Spark Connect.
    """
    _check_has_jvm(session)
    fs = cast(Any, session)._jvm.org.apache.hadoop.fs
    conf = cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
    # Hadoop's own checksums are hidden files beside local ones: ours go along with the file.
    conf.set("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
    conf.set("fs.file.impl.disable.cache", "true")
    source_path, target_path = fs.Path(source), fs.Path(target)
    source_fs, target_fs = source_path.getFileSystem(conf), target_path.getFileSystem(conf)
    if not source_fs.exists(source_path):
        raise WeightsError(f"{source} is not there")
    fs.FileUtil.copy(source_fs, source_path, target_fs, target_path, False, True, conf)
