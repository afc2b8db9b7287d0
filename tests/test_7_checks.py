"""Part 7: invalid configs and tokens are refused, with the field named, before they are used."""

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from asserts import assert_close
from builders import SMALL, layers_of, random_params
from jax import numpy as jnp

from lovely_llama import (
    CONFIGS,
    SIZES,
    LlamaError,
    Params,
    RopeScaling,
    check_config,
    check_params,
    check_tensors,
    check_tokens,
    count,
    empty_cache,
    llama,
    logits,
    loss,
)
from lovely_llama_tools import fast
from lovely_llama_tools.fast.layers import stack


def test_an_error_is_one_line_that_names_file_and_field() -> None:
    error = LlamaError("a.gguf", "dim", 3, 4)
    assert isinstance(error, ValueError)
    assert (str(error), error.file, error.field) == ("a.gguf: dim: got 3, expected 4", "a.gguf", "dim")
    assert str(LlamaError("a\nb", "x\ty", "\u2028", "é")) == "a\\nb: x\\ty: got \\u2028, expected é"


def test_an_error_can_be_pickled() -> None:
    """As process pools do with what is raised in them."""
    error = LlamaError("a.gguf", "dim", 3, 4)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (LlamaError, str(error), vars(error))


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_valid(name: str) -> None:
    check_config(CONFIGS[name])


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        *((size, size, value) for size in SIZES for value in (0, -2, 2**31, 4.0, "4", True)),
        ("head_dim", "head_dim", 7),
        *((name, name, value) for name in ("eps", "theta") for value in (0.0, -1e-5, math.nan, math.inf)),
        *(("tied", "tied", value) for value in ("false", 0, None)),
        *(
            ("rope_scaling", "rope_scaling", value)
            for value in ({}, {"kind": "linear", "factor": 2.0}, ("linear", 2.0))
        ),
        ("rope_scaling", "rope_scaling", RopeScaling("dynamic", 2.0)),
        ("rope_scaling.factor", "rope_scaling", RopeScaling("linear", math.nan)),
        ("rope_scaling.factor", "rope_scaling", RopeScaling("linear", 0.0)),
        ("rope_scaling.original_ctx", "rope_scaling", RopeScaling("llama3", 8.0, 0, 1.0, 4.0)),
        ("rope_scaling", "rope_scaling", RopeScaling("llama3", 8.0, 8192, 4.0, 4.0)),
        ("rope_scaling", "rope_scaling", RopeScaling("yarn", 8.0, 8192, 0.0, 32.0, 1.0)),
        ("rope_scaling.attention_factor", "rope_scaling", RopeScaling("yarn", 8.0, 8192, 1.0, 32.0, math.nan)),
    ],
)
def test_invalid_configs_are_refused(field: str, name: str, value: Any, no_type_checks: None) -> None:
    """None can be made: so no function that takes a config need check it."""
    with pytest.raises(LlamaError) as caught:
        replace(SMALL, **{name: value})
    assert (caught.value.file, caught.value.field) == ("config", field)


def test_numbers_of_numpy_are_accepted(no_type_checks: None) -> None:
    """And become Python's, whose products do not overflow."""
    large = CONFIGS["llama-3.1-405b"]
    config = replace(large, **{name: np.int32(getattr(large, name)) for name in SIZES}, eps=np.float32(1e-5))
    assert count(config) == count(large) == 405_853_388_800
    assert {type(getattr(config, name)) for name in SIZES} == {int}
    assert replace(SMALL, dim=np.int64(SMALL.dim)) == SMALL and hash(SMALL) == hash(replace(SMALL))


# ---- Tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "field", "says"),
    [
        ({"a": (2, 3)}, "tensors", r"1 missing \(b\)"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "tensors", r"1 unexpected \(c\)"),
        ({"a": (3, 2), "b": (4,)}, "a", r"got \(3, 2\), expected \(2, 3\)"),
        ({"x": (2, 3), "b": (4,)}, "tensors", r"1 missing \(a\)"),
    ],
)
def test_wrong_sets_of_tensors_are_refused(found: dict[str, tuple[int, ...]], field: str, says: str) -> None:
    want = {"a": (2, 3), "b": (4,)}
    check_tensors(want, dict(want), "a file")
    with pytest.raises(LlamaError, match=f"^a file: .*{says}") as caught:
        check_tensors(want, found, "a file")
    assert caught.value.field == field


def transposed(params: Params) -> Params:
    """The second layer's W_gate the wrong way round."""
    first, second = layers_of(params)
    return params._replace(blocks=(first, second._replace(ffn=second.ffn._replace(gate=second.ffn.gate.T))))


WRONG: dict[str, tuple[Callable[[Params], Params], str]] = {
    "a layer too few": (lambda p: p._replace(blocks=layers_of(p)[:1]), "tensors"),
    "a layer too many": (lambda p: p._replace(blocks=layers_of(p) * 2), "tensors"),
    "a matrix transposed": (transposed, ".blocks[1].ffn.gate"),
    "no unembedding": (lambda p: p._replace(unembed=None), "tensors"),
    "whole numbers": (lambda p: p._replace(norm=p.norm.astype(jnp.int32)), ".norm"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parameters_of_another_config_are_refused(name: str) -> None:
    """By the check, and by whatever takes parameters, inside `jit` too."""
    change, field = WRONG[name]
    params, tokens = random_params(SMALL), jnp.array([1, 2, 3])
    check_params(params, SMALL)
    doors = [
        check_params,
        lambda params, config: logits(params, tokens, config),
        lambda params, config: fast.logits(params, tokens, config),
        jax.jit(partial(loss, tokens=tokens, targets=tokens), static_argnames="config"),
    ]
    for refuse in doors:
        with pytest.raises(LlamaError) as caught:
            refuse(change(params), config=SMALL)
        assert (caught.value.file, caught.value.field) == ("params", field)


@pytest.mark.parametrize("layers", [1, 2])
def test_stacked_layers_are_refused_in_a_line_that_says_who_takes_them(layers: int) -> None:
    """The library's own doors refuse them; `fast` refuses another number of them."""
    params, tokens = random_params(SMALL), jnp.array([1, 2, 3])
    stacked = params._replace(blocks=stack(layers_of(params)[:layers]))
    for refuse in (check_params, lambda params, config: logits(params, tokens, config)):
        with pytest.raises(LlamaError, match=r"expected a tuple; lovely_llama_tools\.fast takes both") as caught:
            refuse(stacked, SMALL)
        assert (caught.value.file, caught.value.field) == ("params", "blocks")
    if layers != SMALL.layers:
        with pytest.raises(LlamaError, match="expected 2 layers"):
            fast.logits(stacked, tokens, SMALL)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_parameters_of_numpy_are_taken(dtype: Any, no_type_checks: None) -> None:
    """They give what the same numbers in jax's arrays give, in a dtype that jax has."""
    params, tokens = random_params(SMALL), jnp.array([1, 2, 3])
    arrays = jax.tree.map(lambda w: np.asarray(w).astype(dtype), params)
    want = logits(jax.tree.map(jnp.asarray, arrays), tokens, SMALL)
    for function in (logits, fast.logits):
        found = function(arrays, tokens, SMALL)
        assert found.dtype == want.dtype
        assert_close(found, want, 1e-5 if dtype in (np.float32, np.float64) else 3e-2, "logits")


# ---- The position, and the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [-1, 1.5, "1", True, SMALL.ctx, np.array(-1), np.array([0, 1])])
def test_a_start_that_is_no_position_is_refused(start: Any, no_type_checks: None) -> None:
    params, tokens, cache = random_params(SMALL), jnp.array([1, 2, 3]), empty_cache(SMALL, 8, jnp.float32)
    for function in (llama, fast.llama):
        with pytest.raises(LlamaError, match=f"start: got .*, expected a position from 0 to {SMALL.ctx - 1}"):
            function(params, tokens, cache, start, SMALL)


def test_a_cache_of_another_dtype_is_refused(no_type_checks: None) -> None:
    """Under `jit` too: what is written into it would be rounded, or the program fail far from here."""
    params, tokens = random_params(SMALL), jnp.array([1, 2, 3])
    for function in (llama, fast.llama, jax.jit(llama, static_argnames="config")):
        for other in ("bfloat16", "int32"):
            with pytest.raises(LlamaError, match=rf"cache: got {other}, expected float32, the dtype of the"):
                function(params, tokens, empty_cache(SMALL, 8, other), 0, config=SMALL)


# ---- Tokens ----------------------------------------------------------------------------------------------------------


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
