"""Assertions: relative errors leaf by leaf, and one-line refusals."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lovely_llama import LlamaError
from lovely_llama_tools.formats.files import load

jit: Callable[..., Callable[..., Any]] = jax.jit  # untyped: it takes numpy arrays too
# Programs whose numbers are not what is tested compile in a third of the time without optimisation.
QUICK = {"xla_backend_optimization_level": 0}


def assert_close(got: Any, want: Any, bound: float, what: str = "") -> None:
    """‖got − want‖ ≤ bound ‖want‖ for each leaf of two trees, in float64. A failure names every leaf out of bounds."""
    leaves, tree = jax.tree.flatten_with_path(got)
    wanted, wanted_tree = jax.tree.flatten(want)
    assert tree == wanted_tree, f"{what}: got {tree}, expected {wanted_tree}"
    wrong = list[str]()
    for (path, leaf), other in zip(leaves, wanted, strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        a, b = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            wrong.append(f"{name}: got shape {a.shape}, expected {b.shape}")
            continue
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        if not error <= bound * size:  # negated, so that NaN fails too
            wrong.append(f"{name}: got error {error / size if size else error:.2e}, expected at most {bound:.0e}")
    assert not wrong, "\n".join(wrong)


def assert_finite(tree: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float64)).all(), f"{jax.tree_util.keystr(path)}: not finite"


def assert_refused(path: Path, data: bytes, *fields: str) -> str:
    """A file with this content is refused in one line, for one of these fields, without allocating much memory."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(LlamaError) as caught:
            load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message, field = str(caught.value), caught.value.field
    assert caught.value.file == str(path) and field in fields, message
    assert peak < 2**26, f"allocated {peak >> 20} MiB"
    shown = field.replace("\n", "\\n")  # escaped, so that the message is one line
    assert message.startswith(f"{path}: {shown}: got ") and ", expected " in message and "\n" not in message
    assert len(message) < len(str(path)) + 400, message
    return message
