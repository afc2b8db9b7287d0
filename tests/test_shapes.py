"""Shapes stand in every signature of the maths, and are checked: one wrong axis anywhere is refused."""

import inspect
import typing
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SMALL, random_params
from jax import numpy as jnp
from jaxtyping import AbstractArray, Array, TypeCheckError

import lovely_llama as ll

SOURCE = inspect.getsource(ll).splitlines()
RULERS = {line.split()[2].rstrip("."): n for n, line in enumerate(SOURCE, 1) if line.startswith("# ---- ")}
FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(ll, inspect.isfunction)
    if function.__module__ == ll.__name__
    and RULERS["3"] < inspect.unwrap(function).__code__.co_firstlineno < RULERS["8"]
}
# `stack` takes any tuple of layers, and the rest of these have no arrays at all.
WITHOUT_ARRAYS = {"rope_frequencies", "count", "shapes", "empty_cache", "stack", "generate"}


def parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and what it is made of."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def axes(annotation: Any) -> list[str] | None:
    """The names of an array's axes, where an annotation is of one."""
    found = [part for part in parts(annotation) if isinstance(part, type) and issubclass(part, AbstractArray)]
    return found[0].dim_str.split() if found else None


def hints(function: Any) -> dict[str, Any]:
    return inspect.unwrap(function).__annotations__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_array_has_its_axes_in_the_signature(name: str) -> None:
    annotations = hints(FUNCTIONS[name])
    assert set(annotations) == {*inspect.signature(FUNCTIONS[name]).parameters, "return"}
    for parameter, annotation in annotations.items():
        assert Array not in [p for p in parts(annotation) if "Callable" not in repr(annotation)], parameter
    assert (name in WITHOUT_ARRAYS) == (not any(axes(a) is not None for n, a in annotations.items() if n != "return"))


def arguments(name: str) -> dict[str, Any]:
    """Arguments that fit, for each parameter by its name or its axes."""
    params, sizes = random_params(SMALL), {**vars(SMALL), "seq": 5, "pairs": SMALL.head_dim // 2, "n": 7}
    blocks, caches = params.blocks, ll.empty_cache(SMALL, SMALL.ctx, jnp.float32)
    assert not isinstance(blocks, ll.Block)
    w = blocks[0].attn if name == "attention" else blocks[0]
    cache = caches[0] if name in ("attention", "block") else caches
    known = {
        "w": w, "params": params, "config": SMALL, "cache": cache, "start": jnp.array(0), "eps": 1e-5,
        "position": jnp.array(3), "filled": None, "size": 4, "rng": jax.random.key(0), "blocks": blocks,
        "layer": lambda x, w, cache: (x, cache), "last": jnp.array(2), "penalty": 1.5, "t": 0.5, "k": 3, "p": 0.5,
        "sampling": ll.Sampling(),
    }  # fmt: skip

    def value(parameter: str, annotation: Any) -> Any:
        if parameter in known and not (name == "attend" and parameter == "keys"):
            return known[parameter]
        names = axes(annotation)
        assert names is not None, parameter
        kind = jnp.int32 if "Int[" in repr(annotation) else bool if "Bool[" in repr(annotation) else jnp.float32
        return jnp.ones([sizes[axis] for axis in names if axis[0] != "*"] or [2, 3], kind)

    return {p: value(p, a) for p, a in hints(FUNCTIONS[name]).items() if p != "return"}


def call(name: str, values: dict[str, Any]) -> None:
    """Trace it, but for `read`: what it calls is compiled with options, and cannot be part of another."""
    given = partial(FUNCTIONS[name], **values)
    given() if name == "read" else jax.eval_shape(given)


def wrong_axes() -> Iterator[tuple[str, str, int | None]]:
    """Of every array argument: one axis too many, and each axis longer than another argument has it."""
    for name in sorted(set(FUNCTIONS) - WITHOUT_ARRAYS - {"wide"}):
        found = {p: a for p, annotation in hints(FUNCTIONS[name]).items() if (a := axes(annotation)) is not None}
        for parameter, names in found.items():
            if parameter in ("return", "start", "filled") or names[:1] == ["*batch"]:
                continue
            yield name, parameter, None
            for i, axis in enumerate(names):
                if any(axis in others for p, others in found.items() if p not in (parameter, "return")):
                    yield name, parameter, i


@pytest.mark.parametrize(("name", "parameter", "axis"), list(wrong_axes()))
def test_a_wrong_axis_is_refused(name: str, parameter: str, axis: int | None) -> None:
    values = arguments(name)
    if axis is None:
        array = values[parameter]
        values[parameter] = jax.random.split(array, 2) if parameter == "rng" else array[None]
    else:
        array = values[parameter]
        values[parameter] = jnp.array(np.pad(array, [(0, int(i == axis)) for i in range(array.ndim)]))
    with pytest.raises((TypeCheckError, TypeError)):  # the latter from inside, where a matrix in a tuple does not fit
        call(name, values)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - WITHOUT_ARRAYS))
def test_what_fits_is_taken(name: str) -> None:
    """The twin of the test above: it refuses for the axis it says."""
    call(name, arguments(name))
