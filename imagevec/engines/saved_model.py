"""A saved model: a folder of ``spec.json`` beside a converted ``model.xml`` and ``model.bin``.

``quantize`` writes it and ``model="<path>"`` reads it. The graph is data that OpenVINO interprets,
not code; the digests in ``spec.json`` tell damage, not malice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imagevec.engines import openvino
from imagevec.errors import WeightsError
from imagevec.files import content_addressed, digest_of
from imagevec.spec import FeatureSpec

SPEC_FILE = "spec.json"
MODEL_FILES = ("model.xml", "model.bin")


def is_saved_model(model: object) -> bool:
    """Whether a ``model`` option is the path of a saved model."""
    return isinstance(model, str | Path) and (Path(model) / SPEC_FILE).is_file()


def write(folder: Path, spec: FeatureSpec, model: Any) -> None:
    """Writes an ``openvino.Model`` and its spec into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save(model, folder / MODEL_FILES[0])
    content = {
        "spec": json.loads(spec.to_json()),
        "fingerprint": spec.fingerprint,
        "files": {name: digest_of(folder / name) for name in MODEL_FILES},
    }
    (folder / SPEC_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> tuple[FeatureSpec, tuple[Path, ...]]:
    """The spec and the content-addressed files of a saved model.

    Raises:
        WeightsError: The folder is damaged, or was altered.
    """
    try:
        content = json.loads((folder / SPEC_FILE).read_text())
        spec = FeatureSpec.from_json(json.dumps(content["spec"]))
        expected = {name: content["files"][name] for name in MODEL_FILES}
        found = {name: digest_of(folder / name) for name in MODEL_FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} is not a saved model: {error!r}") from error
    if spec.fingerprint != content.get("fingerprint"):
        raise WeightsError(f"{folder / SPEC_FILE} was altered: its fingerprint does not match")
    for name in MODEL_FILES:
        if found[name] != expected[name]:
            raise WeightsError(
                f"{folder / name} was altered: its SHA-256 is {found[name]}, not {expected[name]}"
            )
    return spec, tuple(content_addressed(folder / name) for name in MODEL_FILES)
