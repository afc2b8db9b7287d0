"""beartype for jaxtyping's import hook, once for each signature.

The hook decorates a function within a function again at every call of the outer one, and beartype takes a millisecond.
What jaxtyping gives it has a signature and no code, so equal signatures may share what it makes of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

CHECKERS = dict[Any, Callable[..., Any]]()


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with checks of its arguments, or one that has the same name and signature."""
    key = function.__module__, function.__qualname__, inspect.signature(function)
    try:
        return CHECKERS.get(key) or CHECKERS.setdefault(key, beartype(function))
    except TypeError:  # a default that cannot be hashed
        return beartype(function)
