"""``ImageFeaturizer``: feature vectors as a stage of a ``pyspark.ml`` pipeline."""

from __future__ import annotations

import contextlib
import re
import shutil
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
from imagevec.engines import saved_model
from imagevec.errors import OptionError, WeightsError, did_you_mean
from imagevec.files import PREFIX, digest_of, verified
from imagevec.models.registry import find_source
from imagevec.options import (
    OPTIONS,
    RANDOM,
    WEIGHTS_SUFFIXES,
    Option,
    Options,
    check_choice,
)
from imagevec.spark import hadoop
from imagevec.spark.sessions import check_input_column, find_column, is_connect, quoted
from imagevec.spark.vectorizer import ImageVectorizer
from imagevec.spec import FeatureSpec

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from imagevec.models.factory import ModelFactory

_OUTPUT_TYPES = ("array", "vector")
_FILES = "files"  # the folder of what is saved beside the metadata
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

    ``inputCol``, ``outputCol`` and ``outputType`` (``"array"`` or ``"vector"``) are its own, all
    others are those of ``imagevec.options.Options`` in camelCase.
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
    readTimeoutSeconds: int
    decode: str
    onError: str
    isolate: bool


def _to_path(value: Any) -> str:
    return TypeConverters.toString(str(value) if isinstance(value, Path) else value)


def _to_model(value: Any) -> Any:
    return value if callable(value) else _to_path(value)


def _to_layer(value: Any) -> str:
    if isinstance(value, list | tuple):
        raise TypeError(
            f"{value!r} is not one layer: use a featurizer for each, or ImageVectorizer, whose "
            "layers are fields of a struct"
        )
    return TypeConverters.toString(value)


def _to_count_or_auto(value: Any) -> int | str:
    return "auto" if value == "auto" else TypeConverters.toInt(value)


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "model": _to_model,
    "path": _to_path,
    "layer": _to_layer,
    "names": TypeConverters.toListString,
    "flag": TypeConverters.toBoolean,
    "choice": TypeConverters.toString,
    "text": TypeConverters.toString,
    "auto_or_count": _to_count_or_auto,
    "count": TypeConverters.toInt,
}

_C = TypeVar("_C", bound=type)


def _with_option_params(cls: _C) -> _C:
    """Adds a Param for each of ``imagevec.options.OPTIONS``, with its getter and its setter."""
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
    """Metadata of an ML column: estimators need not run the model to count the features."""
    return {"ml_attr": {"num_attrs": spec.num_features}}  # one layer's: the Param is one name


class _Resolved(NamedTuple):
    """What a featurizer's options came to.

    Attributes:
        options: As they were set.
        weights: A content-addressed copy of weights that are no library's, else ``None``.
        vectorizer: Of these.
    """

    options: Options
    weights: Path | None
    vectorizer: ImageVectorizer


@_with_option_params
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

    outputType: Param[str] = Param(
        Params._dummy(),
        "outputType",
        "array (of float), or vector (of pyspark.ml)",
        TypeConverters.toString,
    )

    if TYPE_CHECKING:  # the params of options, their getters and their setters

        def __getattr__(self, name: str) -> Any: ...

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
        if find_column(schema.names, name):
            raise OptionError(f"outputCol={name!r} is not valid: there is such a column already")
        check_choice("outputType", self.getOutputType(), _OUTPUT_TYPES)
        spec = self._resolve().vectorizer.spec
        metadata = spec.metadata
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
        features = col(quoted(name))
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
            vectorizer = ImageVectorizer(**options)
            weights = self._own_weights(vectorizer.spec) if self._has_own_weights() else None
            self._resolved = _Resolved(options, weights, vectorizer)
        return self._resolved

    def _options(self) -> Options:
        """What was set, and what was the default where it was saved and is not here.

        The other defaults are left to ``resolve``: a saved model has its own.
        """
        return cast(
            Options,
            {
                option.name: self.getOrDefault(name)
                for name, option in _OPTION_OF.items()
                if self.isSet(name) or self.getOrDefault(name) != _DEFAULTS[name]
            },
        )

    def _has_own_weights(self) -> bool:
        """Whether the weights are no library's, but a file's, or what a factory builds."""
        model, weights = self.getModel(), self.getWeights()
        if saved_model.is_saved_model(model) or weights == RANDOM:
            return False
        return weights.endswith(WEIGHTS_SUFFIXES) or find_source(model).identity != "name"

    def _own_weights(self, spec: FeatureSpec) -> Path:
        """A copy of these weights, which the vectorizer of this spec has."""
        stored = cache.find(spec.weights.removeprefix("sha256:"))
        return stored or cache.store(Path(self.getWeights()).expanduser())

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


class _Writer(MLWriter):
    """Saves a featurizer; what cannot be saved is refused before anything is overwritten."""

    def __init__(self, featurizer: ImageFeaturizer) -> None:
        super().__init__()
        model = featurizer.getModel()
        self._saved = featurizer.copy()
        self._files: dict[str, Path] = {}  # the name in the folder of files, and what goes there
        if saved_model.is_saved_model(model):
            folder = Path(str(model))
            files = saved_model.read(folder).files
            spec_file = cache.store(folder / saved_model.SPEC_FILE)
            self._files = {f"{spec_file.stem}/{path.name}": path for path in files}
            self._files[f"{spec_file.stem}/{saved_model.SPEC_FILE}"] = spec_file
            self._saved.setModel(spec_file.stem)
            return
        source = find_source(model)
        reason = source.why_not_saved()
        if reason is not None:
            raise OptionError(reason)
        given = Path(featurizer.getWeights()).expanduser()
        for name in source.beside_weights:
            if featurizer._has_own_weights() and given.with_name(name).is_file():
                raise OptionError(
                    f"a featurizer with weights={str(given)!r} cannot be saved, because the model "
                    f"also reads {name} next to them: use the name of pretrained weights"
                )
        if featurizer._has_own_weights():
            weights = cast(Path, featurizer._resolve().weights)
            self._files = {weights.name: weights}
            self._saved.setWeights(weights.name)

    def saveImpl(self, path: str) -> None:
        session = self.sparkSession
        if self._files:
            hadoop.check_has_jvm(session)
        if is_connect(session) and self.shouldOverwrite:
            metadata = DefaultParamsWriter._get_metadata_to_save(self._saved, session)
            rows = session.createDataFrame([(metadata,)], "value string").coalesce(1)
            rows.write.mode("overwrite").text(f"{path}/metadata")
        else:
            DefaultParamsWriter(self._saved).session(session).saveImpl(path)
        for name, file in self._files.items():
            hadoop.upload(session, file, f"{path}/{_FILES}/{name}")

    def _handleOverwrite(self, path: str) -> None:
        if not is_connect(self.sparkSession):  # there PySpark has no way to delete a folder
            super()._handleOverwrite(path)


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
        reads = session if is_connect(session) else session.sparkContext
        metadata = DefaultParamsReader.loadMetadata(path, reads)
        expected = f"{ImageFeaturizer.__module__}.{ImageFeaturizer.__qualname__}"
        if metadata["class"] != expected:
            raise OptionError(f"{path} holds a {metadata['class']}, not an {expected}")
        featurizer = ImageFeaturizer()._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(featurizer, metadata)
        model, weights = featurizer.getModel(), featurizer.getWeights()
        if _SAVED_NAME.fullmatch(str(model)):
            featurizer.setModel(str(_load_saved_model(session, path, str(model))))
        elif weights.endswith(WEIGHTS_SUFFIXES):
            featurizer.setWeights(str(_load_weights(session, path, weights)))
        return featurizer


def _load_weights(session: SparkSession, folder: str, name: str) -> Path:
    """A saved featurizer's weights file, in the user's cache."""
    if not _SAVED_NAME.fullmatch(name):
        raise WeightsError(f"weights={name!r} in {folder} is not the name of a saved file")
    with cache.temporary_folder() as temporary:
        hadoop.download(session, f"{folder}/{_FILES}/{name}", temporary / name)
        return cache.store(verified(temporary / name), move=True)


def _load_saved_model(session: SparkSession, folder: str, name: str) -> Path:
    """A saved featurizer's saved model, in the user's cache; its name is its spec's digest."""
    cached = cache.folder("saved_models") / name
    source = f"{folder}/{_FILES}/{name}"
    with cache.temporary_folder() as temporary:
        copy = temporary / name
        spec_file = copy / saved_model.SPEC_FILE
        hadoop.download(session, f"{source}/{spec_file.name}", spec_file)
        found, expected = digest_of(spec_file), name.removeprefix(PREFIX)
        if found != expected:
            raise WeightsError(
                f"{source}/{spec_file.name} was altered: its SHA-256 is {found}, not {expected}"
            )
        for file in saved_model.file_names(copy):
            hadoop.download(session, f"{source}/{file}", copy / file)
        saved_model.read(copy)
        try:
            saved_model.read(cached)
        except WeightsError:  # not there, or damaged
            shutil.rmtree(cached, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was first
                copy.rename(cached)
    cache.use(cached)
    return cached
