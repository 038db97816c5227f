from __future__ import annotations

import pkgutil
import types

import imagevec
from tests.helpers.pipeline import run_python


def test_the_public_names_are_all():
    public = {
        name
        for name in dir(imagevec)
        if not name.startswith("_")
        and not isinstance(getattr(imagevec, name), types.ModuleType)
        and name not in ("annotations", "Any", "TYPE_CHECKING")
    }
    assert public == set(imagevec.__all__)


def test_all_is_sorted_and_holds_what_users_rely_on():
    assert sorted(imagevec.__all__) == imagevec.__all__
    documented = {
        "ExtractReport",
        "ImageVectorizer",
        "ReadError",
        "WebDatasetSource",
        "extract",
        "features_udf",
        "make_features_udf",
        "list_models",
        "register_model",
    }
    assert documented <= set(imagevec.__all__)


def test_every_public_name_says_what_it_is():
    for name in imagevec.__all__:
        assert getattr(imagevec, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(imagevec, "vectorise")


def test_importing_imagevec_is_light():
    heavy = {"torch", "torchvision", "pyspark", "pandas", "numpy", "PIL", "openvino", "timm"}
    assert run_python(f"import sys, imagevec; print({heavy} & sys.modules.keys())") == "set()\n"


def test_spark_is_imported_by_the_boundary_alone():
    modules = [
        module.name
        for module in pkgutil.walk_packages(imagevec.__path__, "imagevec.")
        if not module.name.startswith(
            (
                "imagevec.spark",
                "imagevec.table",
                "imagevec.search",
                "imagevec.cli",
                "imagevec.__main__",
            )
        )
    ]
    assert len(modules) > 10
    printed = run_python(
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "print('pyspark' in sys.modules)"
    )
    assert printed.strip() == "False"
