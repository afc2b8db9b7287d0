"""Take guards out of a program: another value for a name, wherever that name has been imported.

Apart from the standard library it needs nothing, so that a process under test can begin with it.
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
    """Put values, written as expressions, in the place of "module:name" or "module:class.name".

    An expression may use the names of that module, and `original` for what it replaces.
    """
    for place, code in guards.items():
        module_name, _, path = place.partition(":")
        module = importlib.import_module(module_name)
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        original = getattr(owner, name, None)  # None where it is a builtin
        value = eval(code, {**vars(module), "original": original})
        set(owner, name, value)
        for other in modules() if original is not None and not owners else ():
            if vars(other).get(name) is original:
                set(other, name, value)
