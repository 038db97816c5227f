"""The table of options, and what is held to it: types, Params, command line and docs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from imagevec.cli import extract, parser
from imagevec.engines import Backend, backend
from imagevec.errors import OptionError
from imagevec.options import (
    DEFAULTS,
    ENGINES,
    FORMATS,
    OPTIONS,
    PRECISIONS,
    Option,
    Options,
    checked,
)
from imagevec.spark.featurizer import FeaturizerParams, ImageFeaturizer
from imagevec.spec import DECODING, ExecutionOptions, FeatureSpec, Preprocessing
from tests.helpers.shared import ROOT

NAMES = [option.name for option in OPTIONS]
BY_NAME = {option.name: option for option in OPTIONS}
FIXED_IN_TABLES = {"on_error", "output"}


def option_id(option: object) -> str | None:
    return option.name if isinstance(option, Option) else None


def fields_of(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def literals(hint: Any) -> set[str]:
    """The strings of a type hint's literals."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {value for part in get_args(hint) for value in literals(part)}


def hints() -> dict[str, Any]:
    """The types of ``Options``; what they import for type checkers alone is any."""
    of_checkers = {"nn": argparse.Namespace(Module=object), "Column": object}
    return get_type_hints(Options, localns=of_checkers)


def test_the_types_have_the_names_of_the_table_in_its_order() -> None:
    assert list(Options.__annotations__) == NAMES
    assert list(DEFAULTS) == NAMES
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_a_default_is_valid_and_stays_as_it_is(option: Option) -> None:
    assert checked({option.name: option.default}) == {option.name: option.default}


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_a_literal_type_has_the_choices_of_the_table(option: Option) -> None:
    told = literals(hints()[option.name]) - {"auto" if option.kind == "auto_or_count" else ""}
    assert told == set(option.choices)


def test_choices_stand_once() -> None:
    assert BY_NAME["engine"].choices == ("auto", *ENGINES)
    assert BY_NAME["precision"].choices == (*PRECISIONS, "auto")
    assert BY_NAME["formats"].default == FORMATS
    decode = get_type_hints(Preprocessing)["decode"]
    assert literals(decode) == set(BY_NAME["decode"].choices)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_a_module_with_the_functions_of_a_backend(name: str) -> None:
    told = {member for member in dir(Backend) if not member.startswith("_")}
    told |= set(Backend.__annotations__)
    assert told >= {"BUILDS_MODULE", "is_available", "version", "why_not", "prepare", "load"}
    assert told <= set(dir(backend(name)))


def test_each_option_is_of_the_spec_or_of_the_execution() -> None:
    execution, spec = (
        fields_of(ExecutionOptions),
        fields_of(FeatureSpec) | {*DECODING, "input_size"},
    )
    assert execution <= set(NAMES)
    assert not execution & spec
    # The engine is decided for the plan: it is its backend.
    assert set(NAMES) - execution - spec == {"engine"}


def test_params_are_the_options_in_camel_case() -> None:
    camel = {re.sub("_(.)", lambda match: match[1].upper(), name): name for name in NAMES}
    del camel["output"]  # outputType is ImageFeaturizer's own
    own = {"inputCol", "outputCol", "outputType"}
    assert set(FeaturizerParams.__annotations__) == own | set(camel)
    featurizer = ImageFeaturizer()
    params = {param.name: param for param in featurizer.params}
    assert set(params) == own | set(camel)
    for param, name in camel.items():
        default: Any = DEFAULTS[name]  # type: ignore[literal-required]
        expected = list(default) if isinstance(default, tuple) else default  # as Spark ML has it
        assert featurizer.getOrDefault(param) == expected
        assert params[param].doc == BY_NAME[name].described
        title = param[0].upper() + param[1:]
        assert hasattr(featurizer, f"get{title}") and hasattr(featurizer, f"set{title}")


def arguments_of_extract() -> dict[str, argparse.Action]:
    own = argparse.ArgumentParser()
    extract.add_arguments(own)
    return {flag: action for action in own._actions for flag in action.option_strings}


def test_extract_has_a_flag_for_each_option() -> None:
    actions = arguments_of_extract()
    for option in OPTIONS:
        flag = f"--{option.name.replace('_', '-')}"
        assert (flag in actions) == (option.name not in FIXED_IN_TABLES), flag
        if flag in actions:
            assert actions[flag].default is None  # a saved model has its own
            assert tuple(actions[flag].choices or ()) == option.choices
            assert option.help in str(actions[flag].help)


def test_the_flags_of_extract_are_options_that_are_valid() -> None:
    words = "extract SRC DEST --model resnet18 --weights random --layer logits --normalize"
    words += " --precision bfloat16 --engine torch --device cpu --batch-size 4 --max-pixels 99"
    words += " --max-bytes 98 --input-size 160x96"
    words += " --formats JPEG,PNG --allowed-roots /a,s3://b --decode scaled --isolate"
    words += " --read-timeout-seconds 9 --background white --value-range 0,4095"
    words += " --truncated accept --boxes boxes"
    parsed = parser().parse_args(words.split())
    given = {name: getattr(parsed, name) for name in set(NAMES) - FIXED_IN_TABLES}
    assert None not in given.values()
    assert checked(given) == {
        "model": "resnet18",
        "weights": "random",
        "layer": "logits",
        "input_size": (160, 96),
        "normalize": True,
        "precision": "bfloat16",
        "engine": "torch",
        "device": "cpu",
        "batch_size": 4,
        "max_pixels": 99,
        "max_bytes": 98,
        "formats": ("JPEG", "PNG"),
        "allowed_roots": ("/a", "s3://b"),
        "read_timeout_seconds": 9,
        "decode": "scaled",
        "background": "#ffffff",
        "value_range": (0.0, 4095.0),
        "truncated": "accept",
        "boxes": "boxes",
        "isolate": True,
    }


def rows_of_the_page() -> list[list[str]]:
    _, _, section = (ROOT / "docs" / "options.md").read_text().partition("# Options\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]


def test_the_page_has_a_row_for_each_option() -> None:
    rows = rows_of_the_page()
    assert [name.strip("`") for name, _, _ in rows] == NAMES
    for (_, default, meaning), option in zip(rows, OPTIONS, strict=True):
        if option.name == "formats":
            assert tuple(default.split(", ")) == FORMATS
        else:
            assert ast.literal_eval(default.strip("`")) == option.default
        for choice in option.choices:
            assert f'"{choice}"' in f"{default} {meaning}", option.name


WRONG_TYPES: dict[str, list[Any]] = {
    "model": [[], {}, None, 5, ("resnet18",)],
    "weights": [[], {}, None, 5, lambda: None],
    "layer": [{"a"}, {}, 5, None, [], [5], [["pooled"]]],
    "input_size": [{}, 2.5, "224", True, [], [224], [1, 2, 3], [224, None], (2.5, 2), b"224"],
    "normalize": [1, "yes", None, []],
    "precision": [[], {}, 16, None, ("float32",)],
    "engine": [[], {}, 5, None],
    "device": [[], {}, 0, None, ("cpu",)],
    "batch_size": [[], {}, 2.5, "8", True, None],
    "max_pixels": [[], {}, 2.5, "auto", True, None],
    "max_bytes": [[], {}, 2.5, "auto", True, None],
    "formats": [5, {}, None, [5], [["JPEG"]], {"JPEG"}, b"JPEG"],
    "allowed_roots": [5, {}, [5], [["/a"]], {"/a"}, b"/a", [None]],
    "read_timeout_seconds": [[], {}, 2.5, "120", True, None],
    "decode": [[], {}, 5, None, True],
    "background": [
        5,
        {},
        True,
        [],
        "whit",
        "#12",
        "#ffffff80",
        (1, 2),
        (0, 0, 256),
        (0.5, 0, 0),
        (True, 1, 1),
        b"red",
    ],
    "value_range": [
        5,
        {},
        True,
        "0,1",
        [],
        [1],
        [1, 2, 3],
        (1, 1),
        (2, 1),
        (0, "1"),
        (0, float("nan")),
        (0, 10**400),
        (2**53, 2**53 + 1),
        (-1e308, 1e308),
    ],
    "truncated": [[], {}, 5, None, True],
    "boxes": [5, {}, True, [], "", b"boxes"],
    "on_error": [[], {}, 5, None],
    "isolate": [1, "yes", None, []],
    "output": [[], {}, 5, None, list],
}


def test_each_option_is_tried_with_wrong_types() -> None:
    assert list(WRONG_TYPES) == NAMES


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_a_value_of_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{name}\b"):
        checked({name: value})


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("formats", "jpeg", "JPEG"),
        ("formats", ["PNG", "webp"], "WEBP"),
        ("device", "CPU", "cpu"),
        ("device", "Cuda", "cuda"),
        ("device", "AUTO", "auto"),
        ("engine", "OpenVINO", "openvino"),
        ("engine", "Torch", "torch"),
        ("precision", "BFloat16", "bfloat16"),
        ("decode", "Scaled", "scaled"),
        ("truncated", "Accept", "accept"),
        ("on_error", "RAISE", "raise"),
        ("output", "Struct", "struct"),
    ],
)
def test_a_name_in_another_case_gets_a_suggestion(name: str, value: Any, near: str) -> None:
    with pytest.raises(OptionError, match=rf"did you mean '{near}'"):
        checked({name: value})


@pytest.mark.parametrize("name", ["Model", "BATCH_SIZE", "batchSize", "on-error"])
def test_an_unknown_option_gets_a_suggestion(name: str) -> None:
    near = name.replace("-", "_").lower().replace("batchsize", "batch_size")
    with pytest.raises(OptionError, match=f"did you mean '{near}'"):
        checked({name: 1})


@pytest.mark.parametrize(
    ("size", "expected"),
    [(224, 224), ((224, 224), 224), ([160, 96], (160, 96)), (np.int64(8), 8), (None, None)],
)
def test_input_size_is_normalised(size: Any, expected: Any) -> None:
    assert checked({"input_size": size}) == {"input_size": expected}


@pytest.mark.parametrize("text", ["0", "-1", "big", "1x2x3", "160x", "axb", "2.5"])
def test_a_wrong_input_size_of_the_command_line_is_refused(text: str) -> None:
    parsed = parser().parse_args(["extract", "SRC", "DEST", f"--input-size={text}"])
    with pytest.raises(OptionError, match="^input_size=.* is not valid: use an integer"):
        checked({"input_size": parsed.input_size})


def test_integers_of_numpy_become_integers():
    values = checked({"batch_size": np.int64(4), "max_pixels": np.uint32(9)})
    assert values == {"batch_size": 4, "max_pixels": 9}
    assert {type(value) for value in values.values()} == {int}
    sizes: Any = {"crop_size": np.int16(8), "resize_size": np.int64(9)}
    assert type(Preprocessing(**sizes).crop_size) is int
    for value in (True, np.bool_(True), np.float32(4), np.int64(0), "4"):
        with pytest.raises(OptionError, match="use an integer of at least 1"):
            checked({"max_pixels": value})
