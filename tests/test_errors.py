from __future__ import annotations

import inspect
import pickle
import re
import sys
import textwrap

import pytest

import imagevec
from imagevec import errors
from imagevec.errors import (
    IMAGE_ERROR_CODES,
    ImageError,
    ImageVecError,
    MissingExtraError,
    OptionError,
    WeightsError,
    did_you_mean,
)
from tests.helpers.pipeline import run_python

EXAMPLES = [
    ImageVecError("no session"),
    OptionError("wrong"),
    WeightsError("altered"),
    ImageError("truncated", "at byte 7"),
    MissingExtraError("timm", "timm"),
]


def test_all_exceptions_are_in_the_tree_of_the_docstring():
    drawn = set(re.findall(r"\w+Error", errors.__doc__)) - {"ValueError", "ImportError"}
    defined = {name for name, _ in inspect.getmembers(errors, inspect.isclass) if "Error" in name}
    assert drawn == defined


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_one_except_clause_catches_all(error):
    assert isinstance(error, ImageVecError)


@pytest.mark.parametrize(
    ("error", "builtin"), [(OptionError, ValueError), (MissingExtraError, ImportError)]
)
def test_errors_are_also_the_builtin_ones(error, builtin):
    assert issubclass(error, builtin)


def test_a_missing_extra_crosses_a_process_boundary():
    test_errors_cross_a_process_boundary(MissingExtraError("timm", "timm"))


@pytest.mark.parametrize("error", EXAMPLES[:-1], ids=lambda error: type(error).__name__)
def test_errors_cross_a_process_boundary(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_an_image_error_starts_with_its_code():
    assert str(ImageError("too_large", "9x9 pixels")) == "too_large: 9x9 pixels"
    assert str(ImageError("empty", "")) == "empty"


def test_codes_are_short_words_with_a_meaning():
    for code, meaning in IMAGE_ERROR_CODES.items():
        assert re.fullmatch(r"[a-z_]+", code)
        assert meaning


def test_a_missing_extra_tells_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'imagevec[timm]'")):
        imagevec.ImageVectorizer(model="timm/resnet18", weights="random")


def test_without_pyspark_the_extra_is_named():
    found = run_python(
        textwrap.dedent("""
        import sys
        sys.modules["pyspark"] = None
        import imagevec
        from imagevec.cli import main
        assert "resnet50" in imagevec.list_models()
        assert main(["models", "--search", "resnet18"]) == 0
        assert main(["extract", "photos", "features"]) == 1
        assert main(["doctor"]) == 0
        try:
            from imagevec import features_udf
        except imagevec.MissingExtraError as error:
            print(error)
    """)
    )
    assert found.endswith("pyspark is not installed: pip install 'imagevec[spark]'\n")


@pytest.mark.parametrize(
    ("value", "choices", "fragment"),
    [
        ("resnet5", ["resnet50", "vgg16"], "did you mean 'resnet50'?"),
        ("xyz", ["cpu", "cuda"], "choose one of 'cpu', 'cuda'"),
        ("xyz", [f"model{number}" for number in range(20)], "20 are known, for example 'model0'"),
        (7, ["a", "b"], "choose one of 'a', 'b'"),
    ],
)
def test_the_nearest_choices_are_named(value, choices, fragment):
    assert fragment in did_you_mean(value, choices)
