"""llama2.c: its model.py's names, and its checkpoint version 0, a bare `.bin` with `tokenizer.model` beside it."""

import math
import os
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, Params, check, count

from ..layout import LLAMA2C, NAMES, all_tensors, from_arrays, from_named, to_arrays
from ..tokens import sentencepiece_tokenizer
from . import Model, blamed_on, check_memory, finite, open_file


def from_llama2c(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in llama2.c's model.py: each a pure reshape, and a copy."""
    return from_arrays(LLAMA2C, arrays, config)


def to_llama2c(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in llama2.c's model.py."""
    return to_arrays(LLAMA2C, params, config)


def load_llama2c(file: BinaryIO, path: Path) -> Model:
    """Version 0: seven int32, then float32 in the order of `NAMES`. eps and theta are those that run.c fixes.

    github.com/karpathy/llama2.c, export.py, legacy_export. Tables of cosines and sines precede the unembedding; they
    are not read.
    """
    must, size, header = partial(check, file=path), os.fstat(file.fileno()).st_size, file.read(28)
    must("size", f"{size} bytes", len(header) == 28, "at least 28")
    fields = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    numbers = dict(zip(fields, struct.unpack("<7i", header), strict=True))
    dim, hidden_dim, layers, heads, kv_heads, vocab, ctx = numbers.values()
    for field, value in (numbers | {"vocab_size": abs(vocab)}).items():
        must(field, value, 1 <= value < 2**31, "a whole number above 0 (is this a llama2.c file?)")
    must("n_heads", heads, dim % heads == 0, f"a divisor of dim, {dim}")
    must("n_kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of n_heads, {heads}")
    shape = (abs(vocab), dim, layers, kv_heads, heads // kv_heads, dim // heads, hidden_dim, ctx)
    with blamed_on(path):
        config, other = (Config(*shape, 1e-5, 1e4, None, tied) for tied in (vocab > 0, vocab < 0))
    tables = ctx * config.head_dim
    need, hint = (28 + 4 * (count(c) + tables) for c in (config, other))
    must("size", f"{size} bytes", size == need, f"{need}" + " (or the other sign of vocab_size)" * (size == hint))
    check_memory(config, path)
    model = path.with_name("tokenizer.model")
    with open_file(model) as proto:
        tokenizer = sentencepiece_tokenizer(proto.read(), model)
    pieces = len(tokenizer.pieces)
    check("pieces", pieces, pieces <= config.vocab, f"at most {config.vocab}, the model's vocabulary", model)

    expected, places, offset = all_tensors(LLAMA2C, config), dict[str, int](), 28
    for field, names in NAMES.items():
        offset += 4 * tables * (field == "unembed")
        name = names[LLAMA2C.column] + ".weight"
        for full in dict.fromkeys(name.format(layer) for layer in range(layers)):
            places[full], offset = offset, offset + 4 * math.prod(expected.get(full, ()))

    def get(name: str) -> Float[np.ndarray, "..."]:
        file.seek(places[name])
        return finite(np.fromfile(file, "<f4", math.prod(expected[name])), name, path)

    tokenizer = tokenizer._replace(pieces=[*tokenizer.pieces, *[b""] * (config.vocab - pieces)])
    return Model(config, from_named(LLAMA2C, get, config), tokenizer)
