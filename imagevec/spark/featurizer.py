"""``ImageFeaturizer``: feature vectors as a stage of a ``pyspark.ml`` pipeline."""

from __future__ import annotations

import functools
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar, cast

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

from imagevec import cache
from imagevec.errors import OptionError, WeightsError, did_you_mean
from imagevec.files import PREFIX, verified
from imagevec.models import saved
from imagevec.models.registry import check_is_name, find_source
from imagevec.options import (
    OPTIONS,
    Option,
    Options,
    check_choice,
    names_file,
)
from imagevec.spark.sessions import (
    check_boxes_column,
    check_input_column,
    find_column,
    is_connect,
    quoted,
)
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.spec import FeatureSpec
from imagevec.storage.folder import Folder
from imagevec.storage.listing import escaped
from imagevec.storage.location import Location, UnsupportedURIError

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from imagevec.models.factory import ModelFactory

_OUTPUT_TYPES = ("array", "vector")
_METADATA = "metadata"  # the subfolder for what pyspark.ml saves
_FILES = "files"  # the subfolder for files saved with the metadata
_SAVED_NAME = re.compile(PREFIX + r"[0-9a-f]{64}(\.\w+)?")


def _camel(option: str) -> str:
    first, *others = option.split("_")
    return first + "".join(word.capitalize() for word in others)


_OPTION_OF = {_camel(option.name): option for option in OPTIONS if option.name != "output"}
_DEFAULTS: dict[str, Any] = {
    "inputCol": "content",
    "outputCol": "features",
    "outputType": "array",
    **{
        name: list(option.default) if isinstance(option.default, tuple) else option.default
        for name, option in _OPTION_OF.items()
    },
}


class FeaturizerParams(TypedDict, total=False):
    """The keyword arguments of ``ImageFeaturizer``.

    ``inputCol``, ``outputCol`` and ``outputType`` (``"array"`` or ``"vector"``) are specific to it.
    The others are those of ``imagevec.options.Options``, in camelCase.
    """

    inputCol: str
    outputCol: str
    outputType: str
    model: str | ModelFactory
    weights: str
    layer: str
    inputSize: int | list[int] | None
    normalize: bool
    precision: str
    engine: str
    device: str
    batchSize: int | str
    maxPixels: int
    maxBytes: int
    formats: list[str]
    allowedRoots: list[str]
    readTimeoutSeconds: int
    decode: str
    background: str | list[int] | None
    valueRange: list[float] | None
    truncated: str
    boxes: str | None
    onError: str
    isolate: bool


def _to_path(value: Any) -> str:
    return TypeConverters.toString(str(value) if isinstance(value, Path) else value)


def _to_model(value: Any) -> Any:
    return value if callable(value) else _to_path(value)


def _to_layer(value: Any) -> str:
    if isinstance(value, list | tuple):
        raise TypeError(
            f"{value!r} is not a single layer: use one featurizer per layer, or ImageVectorizer, "
            "which returns several layers as a struct"
        )
    return TypeConverters.toString(value)


def _to_size(value: Any) -> int | list[int]:
    if isinstance(value, list | tuple):
        return TypeConverters.toListInt(value)
    return TypeConverters.toInt(value)


def _to_count_or_auto(value: Any) -> int | str:
    return "auto" if value == "auto" else TypeConverters.toInt(value)


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "model": _to_model,
    "path": _to_path,
    "layer": _to_layer,
    "size": _to_size,
    "names": TypeConverters.toListString,
    "range": TypeConverters.toListFloat,
    "flag": TypeConverters.toBoolean,
    "choice": TypeConverters.toString,
    "text": TypeConverters.toString,
    "auto_or_count": _to_count_or_auto,
    "count": TypeConverters.toInt,
}

_C = TypeVar("_C", bound=type)


def _with_option_params(cls: _C) -> _C:
    """Adds a Param, a getter and a setter for each of ``imagevec.options.OPTIONS``."""
    for name, option in _OPTION_OF.items():
        _add_param(cls, name, option)
    return cls


def _add_param(cls: type, name: str, option: Option) -> None:
    def get(self: Params) -> Any:
        return self.getOrDefault(name)

    def set(self: Params, value: Any) -> Any:
        return self._set(**{name: value})

    title = name[0].upper() + name[1:]
    for prefix, method in (("get", get), ("set", set)):
        method.__name__ = f"{prefix}{title}"
        method.__qualname__ = f"{cls.__qualname__}.{method.__name__}"
        method.__doc__ = f"{prefix.capitalize()}s {name}: {option.described}."
        setattr(cls, method.__name__, method)
    converter = _CONVERTERS[option.kind]
    setattr(cls, name, Param(Params._dummy(), name, option.described, converter))


def _length_of_vectors(spec: FeatureSpec) -> dict[str, Any]:
    """Returns ML metadata, so that estimators need not run the model to count the features."""
    return {"ml_attr": {"num_attrs": spec.num_features}}  # an int: the Param takes one layer


class _Resolved(NamedTuple):
    """The result of resolving a featurizer's options.

    Attributes:
        options: The options as they were set.
        weights: A content-addressed copy of custom weights, else ``None``.
        vectorizer: The vectorizer with these options.
    """

    options: Options
    weights: Path | None
    vectorizer: ImageVectorizer


@_with_option_params
class ImageFeaturizer(
    Transformer, HasInputCol, HasOutputCol, MLReadable["ImageFeaturizer"], MLWritable
):
    """A ``pyspark.ml`` Transformer that computes feature vectors for a column of images.

        featurizer = ImageFeaturizer(model="resnet50", outputType="vector")
        model = Pipeline(stages=[featurizer, LogisticRegression()]).fit(photos)

    Wrong types are rejected when a param is set. Invalid values are rejected by
    ``transformSchema``, before a job starts. A null or bad image gives a null, which most
    estimators do not accept: drop these rows in an intermediate stage, or set ``onError="raise"``.

    ``save`` accepts the paths and URIs that Spark accepts. It copies files that only this machine
    has: a weights file, the weights that a registered model's factory built, the folder of a saved
    model. This process and Spark must share the folder then. The copies are named by their SHA-256,
    and ``load`` verifies them. Models and weights of torchvision and timm are saved by name, and
    resolved by the versions that are installed where they are loaded. No code is saved: a
    registered model must be registered again before the loaded featurizer is used, and a featurizer
    with a bare factory cannot be saved.

    Args:
        **params: See ``FeaturizerParams``.

    Raises:
        OptionError: A param does not exist.
        TypeError: A value has the wrong type.
    """

    outputType: Param[str] = Param(
        Params._dummy(),
        "outputType",
        "array (of floats) or vector (of pyspark.ml)",
        TypeConverters.toString,
    )

    if TYPE_CHECKING:  # the params of the options, with their getters and setters

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **params: Unpack[FeaturizerParams]) -> None:
        super().__init__()
        self._resolved: _Resolved | None = None
        self._setDefault(**_DEFAULTS)
        self.setParams(**params)

    def setParams(self, **params: Unpack[FeaturizerParams]) -> Self:
        """Sets the given params. The others keep their values."""
        for name in params.keys() - _DEFAULTS.keys():
            raise OptionError(f"the param {name!r} is not known: {did_you_mean(name, _DEFAULTS)}")
        return self._set(**params)

    def transformSchema(self, schema: StructType) -> StructType:
        """Checks the schema and the options, and returns the schema with the output column.

        Raises:
            OptionError: The input column or that of the boxes is missing or its type is not
                accepted, the output column already exists (ignoring case), or an option is invalid.
            WeightsError: The weights cannot be loaded, or do not fit the model.
        """
        check_input_column(schema, self.getInputCol())
        name = self.getOutputCol()
        if find_column(schema.names, name):
            raise OptionError(f"outputCol={name!r} is not valid: this column already exists")
        check_choice("outputType", self.getOutputType(), _OUTPUT_TYPES)
        spec = self._resolve().vectorizer.spec
        boxes = self.getBoxes()
        if boxes is not None:
            check_boxes_column(schema, boxes)
            if self.getOutputType() == "vector":
                raise OptionError(
                    f"outputType='vector' is not valid with boxes={boxes!r}, which give an array "
                    "of vectors: use outputType='array', and explode it for an estimator"
                )
        metadata = spec.metadata
        if self.getOutputType() == "array":
            vector = ArrayType(FloatType())
            kind = vector if boxes is None else ArrayType(vector)
            field = StructField(name, kind, True, metadata)
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
        features = col(quoted(name))
        vectors = when(features.isNotNull(), array_to_vector(features))  # fails on null
        metadata = df.schema[name].metadata | _length_of_vectors(vectorizer.spec)
        return df.withColumn(name, vectors.alias(name, metadata=metadata))

    def _resolve(self) -> _Resolved:
        """Loads and checks the model on first use after its options were set.

        The weights are then fixed, even if their file changes or a factory would draw new ones:
        later stages of a pipeline were fitted to them.
        """
        options = self._options()
        if self._resolved is None or self._resolved.options != options:
            vectorizer = ImageVectorizer(**options)
            source = find_source(self.getModel())
            weights = source.own_weights(self.getWeights(), vectorizer.spec)
            self._resolved = _Resolved(options, weights, vectorizer)
        return self._resolved

    def _options(self) -> Options:
        """Returns the options that were set, and saved defaults that differ from the current ones.

        The other defaults are left to ``make_plan``: a saved model has its own.
        """
        return cast(
            Options,
            {
                option.name: self.getOrDefault(name)
                for name, option in _OPTION_OF.items()
                if self.isSet(name) or self.getOrDefault(name) != _DEFAULTS[name]
            },
        )

    def write(self) -> MLWriter:
        """Returns a writer, for example for ``featurizer.write().overwrite().save(path)``.

        Raises:
            OptionError: The model is a factory.
            WeightsError: The weights file or the saved model cannot be read.
        """
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader[ImageFeaturizer]:
        """Returns a reader. ``load(path)`` is short for ``read().load(path)``."""
        return _Reader()

    def setInputCol(self, value: str) -> Self:
        return self._set(inputCol=value)

    def setOutputCol(self, value: str) -> Self:
        return self._set(outputCol=value)

    def setOutputType(self, value: str) -> Self:
        return self._set(outputType=value)

    def getOutputType(self) -> str:
        return self.getOrDefault(self.outputType)


class _Writer(MLWriter):
    """Saves a featurizer. Options that cannot be saved raise before anything is overwritten."""

    def __init__(self, featurizer: ImageFeaturizer) -> None:
        super().__init__()
        source = find_source(featurizer.getModel())
        options, self._files = source.to_save(
            featurizer.getWeights(), lambda: featurizer._resolve().weights
        )
        self._saved = featurizer.copy()
        self._saved._set(**options)

    def save(self, path: str) -> None:
        """Saves the featurizer.

        Raises:
            OptionError: This process cannot write files to the folder, or Spark has another folder
                of this path.
            WriteError: The store does not answer, or denies access.
        """
        if self._files and not Location.of(path).is_local:
            _metadata_files(Folder(path))  # before anything is overwritten
        super().save(path)

    def saveImpl(self, path: str) -> None:
        session = self.sparkSession
        metadata = DefaultParamsWriter._get_metadata_to_save(self._saved, session)
        rows = session.createDataFrame([(metadata,)], "value string").coalesce(1)
        mode = "overwrite" if self.shouldOverwrite else "error"
        rows.write.mode(mode).text(f"{path}/{_METADATA}")
        if self._files:
            folder = _folder(session, path)
            if self.shouldOverwrite:
                folder.delete(_FILES)
            for name, file in self._files.items():
                folder.upload(file, f"{_FILES}/{name}")

    def _handleOverwrite(self, path: str) -> None:
        if not is_connect(self.sparkSession):  # on Connect, PySpark cannot delete a folder
            super()._handleOverwrite(path)


class _Reader(MLReader[ImageFeaturizer]):
    """Loads a featurizer. Its files are verified and copied to the user's cache."""

    def load(self, path: str) -> ImageFeaturizer:
        """Loads a saved featurizer.

        Raises:
            OptionError: The folder contains something else, names its model by a path, or contains
                files and cannot be read by this process.
            WeightsError: A file is missing or was altered. The message contains both digests.
        """
        session = self.sparkSession
        # Spark 3.5 needs the context, Spark 4 accepts either, Spark Connect has no context.
        reads = session if is_connect(session) else session.sparkContext
        metadata = DefaultParamsReader.loadMetadata(escaped(path), reads)
        expected = f"{ImageFeaturizer.__module__}.{ImageFeaturizer.__qualname__}"
        if metadata["class"] != expected:
            raise OptionError(f"{path} contains a {metadata['class']}, not an {expected}")
        featurizer = ImageFeaturizer()._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(featurizer, metadata)
        model, weights = featurizer.getModel(), featurizer.getWeights()
        if _SAVED_NAME.fullmatch(str(model)):
            origin = _folder(session, path).sub(f"{_FILES}/{model}")
            download = functools.partial(_download, origin)
            featurizer.setModel(str(saved.copy_to_cache(str(model), origin.path, download)))
        else:
            check_is_name(str(model), path)
        if names_file(weights) or _SAVED_NAME.fullmatch(weights):
            featurizer.setWeights(str(_load_weights(session, path, weights)))
        return featurizer


def _folder(session: SparkSession, path: str) -> Folder:
    """Returns the folder of a featurizer whose metadata is saved.

    Spark knows the place of a path: relative ones start from the JVM's working directory, and those
    without a scheme can be in any file system.

    Raises:
        OptionError: This process does not find the metadata there, or cannot read the store.
    """
    metadata = session.read.text(escaped(f"{path}/{_METADATA}"))
    for file in metadata.inputFiles():
        root, _, name = file.rpartition(f"/{_METADATA}/")
        folder = Folder(urllib.parse.unquote(root) if Location.parse(root).is_local else root)
        if name in _metadata_files(folder):
            return folder
    raise OptionError(
        f"Spark and this process do not share {path}: use a URI, or a path on a shared disk"
    )


def _metadata_files(folder: Folder) -> list[str]:
    try:
        return folder.names(_METADATA)
    except UnsupportedURIError as error:
        raise OptionError(f"{folder.path} cannot contain weights or models: {error}") from error


def _download(folder: Folder, name: str, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    try:
        folder.download(name, to)
    except FileNotFoundError as error:
        raise WeightsError(f"{folder.path}/{name} does not exist") from error


def _load_weights(session: SparkSession, path: str, name: str) -> Path:
    """Copies the weights file of a saved featurizer to the user's cache."""
    if not _SAVED_NAME.fullmatch(name):
        raise WeightsError(f"weights={name!r} in {path} is not the name of a saved file")
    with cache.temporary_folder() as temporary:
        _download(_folder(session, path).sub(_FILES), name, temporary / name)
        return cache.store(verified(temporary / name), move=True)
