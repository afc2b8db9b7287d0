"""Packages: optional ones, imported where they are needed and named where they are missing; and jax's version."""

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from lovely_llama import LlamaError, check

# The packages of each extra, by the names under which an index has them. This project itself is on none.
PACKAGES = {
    "chat": ("gguf", "tokenizers", "jinja2", "tqdm"),
    "hub": ("huggingface_hub",),
    "torch": ("torch",),
    "tiktoken": ("tiktoken",),
    "train": ("matplotlib", "tensorboardX", "tqdm"),
    "plot": ("matplotlib",),
    "eval": ("lm-eval",),
    "tpu": ("jax[tpu]",),
    "scale": ("orbax-checkpoint",),
}


def check_jax() -> None:
    """Refuse a jaxlib that is too old. The library does not ask."""
    version: str = importlib.import_module("jaxlib").__version__
    new = [*map(int, re.findall(r"\d+", version)[:2])] >= [0, 10]
    check("jaxlib", version, new, "0.10 or later: pip install jax==0.10.2 jaxlib==0.10.2", "environment")


check_jax()


def extra(module: str, name: str) -> Any:
    """Import a module of the extra `name`, or say how to install its packages."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        how = f"it: pip install {shlex.join(PACKAGES[name])}"
        raise LlamaError("environment", module.split(".")[0], "no such package", how) from error


def counted(n: int, noun: str, form: str = "") -> str:
    """A number of things: "1 step", "2 steps"; in the form ",", "1,000 steps"."""
    return f"{n:{form}} {noun}" if n == 1 else f"{n:{form}} {noun}s"


def spans(numbers: Sequence[int]) -> str:
    """Numbers in words, runs of them, up or down, by their ends: "0-3, 7"."""
    runs = list[list[int]]()
    for n in numbers:
        step = n - runs[-1][-1] if runs else 0
        if abs(step) == 1 and (len(runs[-1]) == 1 or step == runs[-1][-1] - runs[-1][-2]):
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@contextmanager
def progress(what: str, total: int, unit: str = "", delay: int = 1) -> Generator[Callable[[int], object]]:
    """A bar on stderr for something that takes over `delay` seconds; what it gives is called with each advance.

    There is none where stderr is no terminal, or tqdm is not installed.
    """
    shown = sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison] -- if closed
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield lambda n: None
        return
    bar: Any = importlib.import_module("tqdm").tqdm(total=total, desc=what, unit=unit, delay=delay, leave=False)
    with bar:
        yield bar.update
