"""The library with a few words changed, in a namespace of its own: its functions compiled anew, itself untouched."""

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import lovely_llama


class Words(NamedTuple):
    """A change of a function: `new` in place of `old`, which occurs in its source exactly once."""

    function: str
    old: str
    new: str


class Source(NamedTuple):
    """A function of the library: where it begins, its text, and the names it refers to."""

    line: int
    text: str
    names: frozenset[str]


@cache
def library() -> dict[str, Source]:
    """The library's functions in their order."""
    text = inspect.getsource(lovely_llama)
    lines = text.splitlines(keepends=True)
    return {
        node.name: Source(
            node.lineno,
            "".join(lines[node.lineno - 1 : node.end_lineno]),
            frozenset(name.id for name in ast.walk(node) if isinstance(name, ast.Name)),
        )
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def variant(
    words: Sequence[Words],
    names: Mapping[str, Any] | None = None,
    wraps: Mapping[str, Callable[..., Any]] | None = None,
) -> ModuleType:
    """The library with words changed, with further names that the new words use, and with some functions wrapped.

    Compiled anew are the changed functions and those that refer to one of them or to a wrapped one, as a default is
    bound where a function is defined. All else is the library's own: its classes, and functions that a program may have
    compiled already.
    """
    wraps, changed = wraps or {}, rewritten(words)
    module = ModuleType("lovely_llama")
    module.__dict__.update({name: value for name, value in vars(lovely_llama).items() if name[:2] != "__"})
    module.__dict__.update(names or {})
    anew, file = concerned(changed) | concerned(wraps) - wraps.keys(), inspect.getfile(lovely_llama)
    for name, (line, text, _) in library().items():
        if name in anew:
            exec(compile("\n" * (line - 1) + changed.get(name, text), file, "exec"), module.__dict__)
        if name in wraps:
            module.__dict__[name] = wraps[name](module.__dict__[name])
    return module


def rewritten(words: Sequence[Words]) -> dict[str, str]:
    """The text of each function that words change."""
    changed = dict[str, str]()
    for function, old, new in words:
        text = changed.get(function, library()[function].text)
        if text.count(old) != 1:
            raise ValueError(f"{function}: {old!r} occurs {text.count(old)} times")
        changed[function] = text.replace(old, new)
    return changed


def concerned(names: Iterable[str]) -> set[str]:
    """The functions that a change of some concerns: these, and all that refer to one of them."""
    found = set(names)
    while more := {name for name, source in library().items() if source.names & found} - found:
        found |= more
    return found
