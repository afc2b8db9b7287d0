"""Part 1: invalid configs and tokens are refused, with the field named, before they are used."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import SMALL

from lovely_llama import CONFIGS, Config, LlamaError, RopeScaling, check_config, check_tokens

SIZES = ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx")


def changed(config: Config, **fields: Any) -> Config:
    """`replace` without type checks, for values of the wrong type."""
    config = replace(config)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    return config


def test_an_error_is_one_line_that_names_file_and_field() -> None:
    error = LlamaError("a.gguf", "dim", 3, 4)
    assert isinstance(error, ValueError)
    assert (str(error), error.file, error.field) == ("a.gguf: dim: got 3, expected 4", "a.gguf", "dim")


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_valid(name: str) -> None:
    check_config(CONFIGS[name])


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        *((size, size, value) for size in SIZES for value in (0, -2, 2**31, 4.0, "4", True)),
        ("head_dim", "head_dim", 7),
        *((name, name, value) for name in ("eps", "theta") for value in (0.0, -1e-5, math.nan, math.inf)),
        ("rope_scaling", "rope_scaling", RopeScaling("dynamic", 2.0)),
        ("rope_scaling.factor", "rope_scaling", RopeScaling("linear", math.nan)),
        ("rope_scaling.factor", "rope_scaling", RopeScaling("linear", 0.0)),
        ("rope_scaling.original_ctx", "rope_scaling", RopeScaling("llama3", 8.0, 0, 1.0, 4.0)),
        ("rope_scaling", "rope_scaling", RopeScaling("llama3", 8.0, 8192, 4.0, 4.0)),
        ("rope_scaling", "rope_scaling", RopeScaling("yarn", 8.0, 8192, 0.0, 32.0, 1.0)),
        ("rope_scaling.attention_factor", "rope_scaling", RopeScaling("yarn", 8.0, 8192, 1.0, 32.0, math.nan)),
    ],
)
def test_invalid_configs_are_refused(field: str, name: str, value: Any) -> None:
    with pytest.raises(LlamaError) as caught:
        check_config(changed(SMALL, **{name: value}), "somewhere")
    assert (caught.value.file, caught.value.field) == ("somewhere", field)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "got 0 tokens, expected 1 to 5"),
        ([1] * 6, "got 6 tokens, expected 1 to 5"),
        ([[1, 2]], "2 axes"),
        ([[1], [1, 2]], "rows of different lengths"),
        (3, "0 axes"),
        ([1.0], "float64"),
        ([True], "bool"),
        (["a"], "<U1"),
        ([0, -1], r"\[-1\]"),
        ([28, 29], r"\[29\], expected ids from 0 to 28"),
        (np.array([2**32 + 3]), "4294967299"),
        ([2**70], "object"),
    ],
)
def test_invalid_tokens_are_refused(tokens: Any, says: str) -> None:
    with pytest.raises(LlamaError, match=rf"^a prompt: tokens: .*{says}") as caught:
        check_tokens(tokens, 29, 5, "a prompt")
    assert caught.value.field == "tokens"


@pytest.mark.parametrize("kind", [list, tuple, np.int64, np.uint8, np.int32])
def test_tokens_of_any_integer_type_become_int32(kind: Any) -> None:
    tokens = kind([3, 28]) if isinstance(kind, type) and issubclass(kind, list | tuple) else np.array([3, 28], kind)
    ids = check_tokens(tokens, 29, 5)
    assert ids.tolist() == [3, 28] and ids.dtype == np.int32
