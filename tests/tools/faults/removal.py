"""Remove guards from a program: give a name another value, wherever it has been imported.

It needs only the standard library, so a process under test can import it first.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

PROJECT = ("lovely_llama", "lovely_llama_tools")


def modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.partition(".")[0] in PROJECT]


def remove(guards: Mapping[str, str], set: Callable[[object, str, object], object] = setattr) -> None:
    """Replace "module:name" or "module:class.name" with the values of expressions; ".module" is one of the tools.

    An expression may use the names of that module, and `original` for the value it replaces.
    """
    for place, code in guards.items():
        module_name, _, path = place.partition(":")
        module = importlib.import_module(module_name, "lovely_llama_tools")
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name, None)  # None for a builtin
        value = eval(code, {**vars(module), "original": original})
        set(owner, name, value)
        for other in modules() if original is not None and not owners else ():
            if vars(other).get(name) is original:
                set(other, name, value)
