"""Checkpoint formats, one module each: a file in, a `Model` out. Here is what they share."""

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, Params, check, count

from ..tokens import Tokenizer


class Model(NamedTuple):
    """What a checkpoint holds."""

    config: Config
    params: Params
    tokenizer: Tokenizer


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; pipes and devices could block."""
    try:
        check("path", "not a regular file", path.is_file(), "a regular file", path)
        return open(path, "rb")
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


def check_memory(config: Config, file: object) -> None:
    """Refuse a model whose float32 parameters exceed the physical memory, before any is read."""
    have, need = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 4 * count(config) / 2**30
    check("memory", f"{have:.1f} GiB", need <= have, f"{need:.1f} GiB for the parameters", file)


def finite(array: Float[np.ndarray, "..."], name: str, file: object) -> Float[np.ndarray, "..."]:
    """Refuse a tensor that contains NaN or ∞."""
    check(name, "NaN or ∞", bool(np.isfinite(array).all()), "finite numbers", file)
    return array
