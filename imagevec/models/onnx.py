"""ONNX files, which contain a model's graph and weights.

``model="path/to/net.onnx"`` runs a file, and ``model="folder"`` the ``model.onnx`` or
``onnx/model.onnx`` in it. The graph takes one batch of images, float or uint8, ``(N, 3, H, W)`` or
``(N, H, W, 3)``, and returns vectors ``(N, D)``. OpenVINO runs it.

Images are preprocessed as ``preprocessing`` of ``register_model`` says, else as a
``preprocessor_config.json`` beside the file does, else by torchvision's preset at the input's size.
A graph of uint8 takes the pixels as they are; one of floats takes them normalised by ``mean`` and
``std``. If it normalises images itself, use ``mean=(0, 0, 0)``, and ``std=(1, 1, 1)`` if it takes
numbers from 0 to 1 or ``std=(1 / 255,) * 3`` if it takes numbers from 0 to 255.

ONNX files contain no code. A file can name others that contain weights: they must be in its folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from imagevec import cache
from imagevec.errors import OptionError
from imagevec.files import digest_of, expanded
from imagevec.models import image_processors
from imagevec.models.onnx_file import Input, OnnxFile, read
from imagevec.models.source import IMAGENET, ModelSource
from imagevec.options import RANDOM
from imagevec.spec import FeatureSpec, Preprocessing, Tokenization

if TYPE_CHECKING:
    from torch import nn

    from imagevec.engines import Backend, OnnxBackend
    from imagevec.models.features import FeatureModel

PREFIX = ""
SUFFIX = ".onnx"

_IN_FOLDER = ("model.onnx", "onnx/model.onnx")  # as optimum and transformers.js write them
_DTYPES = ("float32", "float16", "bfloat16", "float64", "uint8")


def find(model: Any) -> OnnxSource | None:
    """Returns the source of a path that ends in ``.onnx``, or of a folder with such a model.

    Raises:
        OptionError: The file does not exist.
    """
    if not isinstance(model, str | Path):
        return None
    path = expanded(model).absolute()
    if path.suffix.lower() != SUFFIX or path.is_dir():
        files = (path / name for name in _IN_FOLDER)
        in_folder = next((file for file in files if file.is_file()), None)
        has_weights = in_folder is not None and any(path.glob("*.safetensors"))
        return None if in_folder is None or has_weights else OnnxSource(in_folder)
    if not path.is_file():
        raise OptionError(f"model={str(model)!r}: no such file")
    return OnnxSource(path)


def names(part: str = "") -> list[str]:
    """Returns no names: files are given by path."""
    return []


@dataclass(frozen=True)
class OnnxSource(ModelSource):
    """An ONNX file whose graph takes images and returns vectors."""

    path: Path
    preset: Preprocessing | None = None
    registered_name: str | None = None

    backends = ("openvino",)
    identity = "file"
    libraries = ()
    contains_weights = True

    @property
    def name(self) -> str:
        return self.registered_name or f"onnx:{self.path.stem}"

    def files(self, weights: str) -> list[Path]:
        described = [] if self.preset else image_processors.files(self._folder)
        return [self.path, *read(self.path).external, *described]

    @property
    def _folder(self) -> Path:
        """The folder that ``preprocessor_config.json`` is in."""
        parent = self.path.parent
        return parent.parent if parent.name == "onnx" else parent

    def to_save(
        self, weights: str, own: Callable[[], Path | None]
    ) -> tuple[dict[str, str], dict[str, Path]]:
        raise OptionError(
            f"a featurizer with model={str(self.path)!r} cannot be saved: pass the file again "
            "where it is used, or save an int8 model made by imagevec.quantize"
        )

    def check(self, layer: str | tuple[str, ...]) -> None:
        """Checks the input. The layers are checked when the graph is read."""
        _check_input(read(self.path))

    def weights(self, option: str) -> Path | nn.Module | None:
        """Returns the file, or a list of the SHA-256 of all files if there are several."""
        if option != "DEFAULT":
            raise OptionError(f"weights={option!r} is not valid: {self.path.name} contains weights")
        external = read(self.path).external
        if not external:
            return self.path
        lines = [
            f"{digest_of(file)}  {file.relative_to(self.path.parent)}\n"
            for file in (self.path, *external)
        ]
        with cache.temporary_folder() as folder:
            path = folder / "sha256.txt"  # as `sha256sum` prints it
            path.write_text("".join(lines))
            return cache.store(path, move=True)

    def has_weights(self) -> bool:
        return True

    def preprocessing(self, weights_digest: str | None, weights: str = RANDOM) -> Preprocessing:
        image = read(self.path).image
        chosen = self.preset or self._of_folder() or _of_input(image)
        for side, taken in zip(chosen.input_shape, image.height_and_width, strict=True):
            if taken not in (None, side):
                height, width = image.height_and_width
                raise OptionError(
                    f"crop_size={chosen.crop_size} is not valid: {self.path.name} takes images of "
                    f"{height}x{width}"
                )
        if image.dtype == "uint8":  # the pixels, from 0 to 255
            return dataclasses.replace(chosen, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
        return chosen

    def _of_folder(self) -> Preprocessing | None:
        folder = self._folder
        return image_processors.read(folder) if image_processors.files(folder) else None

    def resized(
        self, preprocessing: Preprocessing, input_size: int | tuple[int, int]
    ) -> Preprocessing:
        if None not in read(self.path).image.height_and_width:
            return super().resized(preprocessing, input_size)
        return preprocessing.with_input_size(input_size)

    def build(self, preprocessing: Preprocessing | Tokenization) -> nn.Module:
        raise OptionError(f"{self.path.name} is an ONNX file: engine='openvino' runs it")

    def convert(
        self, backend: Backend, model: FeatureModel
    ) -> tuple[FeatureSpec, tuple[Path, ...]]:
        files, sizes = cast("OnnxBackend", backend).prepare_onnx(read(self.path), model)
        return model.spec_of(sizes), files


def _check_input(file: OnnxFile) -> None:
    if len(file.inputs) > 1:
        listed = ", ".join(image.name for image in file.inputs)
        raise OptionError(
            f"{file.path.name} is not valid: it takes {len(file.inputs)} inputs ({listed}). Export "
            "a model that only takes images, such as the image tower of CLIP"
        )
    image = file.image
    channels = image.shape[image.layout.index("C")] if len(image.shape) == 4 else 0
    if image.dtype not in _DTYPES or channels not in (None, 3):
        raise OptionError(
            f"{file.path.name} is not valid: its input is {image}, not images, float or uint8 "
            "(N, 3, H, W) or (N, H, W, 3)"
        )


def _of_input(image: Input) -> Preprocessing:
    """Returns torchvision's preset at the size of the input."""
    height, width = (side or IMAGENET.input_shape[0] for side in image.height_and_width)
    if height != width:
        return IMAGENET.with_input_size((height, width))
    # the ratio of the preset, 256 to 224
    return Preprocessing(resize_size=math.floor(height / 0.875), crop_size=height)
