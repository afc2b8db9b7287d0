# jax.test_util: derivatives checked against finite differences.

from collections.abc import Callable, Sequence
from typing import Any

def check_grads(
    f: Callable[..., Any],
    args: Sequence[Any],
    order: int,
    modes: Sequence[str] = ("fwd", "rev"),
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
) -> None: ...
