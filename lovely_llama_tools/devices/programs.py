"""How programs are compiled: `jax.jit` with options that make them right or faster, where XLA knows these."""

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, cached_property, update_wrapper
from typing import Any

import jax

# On a CPU, jaxlib 0.10.2 computes some products under `vmap` wrongly where it fuses them with what follows
# (jax-ml/jax#39103). Products by themselves are right, and as fast: docs/numerics.md has the figures.
FUSIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
RIGHT: dict[str, Any] = FUSIONS if importlib.import_module("jaxlib").__version__ == "0.10.2" else {}
# On CPUs with 512-bit vectors XLA uses 256 bits by default. This makes decoding some 7 % faster.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


@cache
def known(name: str, value: Any) -> bool:
    """Whether this XLA has an option. Compiling with one that it lacks is an error."""
    with suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        return True
    return False


class Program:
    """`jax.jit` of a function with `RIGHT` and further compiler options, those that this XLA knows.

    This is found out at the first call, since importing a module must not start XLA. jax refuses compiler options
    within another program, so a function that others may trace stays with `jax.jit`.
    """

    def __init__(
        self, function: Callable[..., Any], compiler_options: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.function, self.options, self.wanted = function, options, RIGHT | dict(compiler_options or {})
        update_wrapper(self, function)

    @cached_property
    def jitted(self) -> Any:
        """The function under `jax.jit`."""
        options = {name: value for name, value in self.wanted.items() if known(name, value)}
        return jax.jit(self.function, compiler_options=options, **self.options)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return self.jitted(*arguments, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)
