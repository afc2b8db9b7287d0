"""Reports on checkpoints: config, tokenizer, how each field was interpreted, and tensors beside our parameters."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np

from lovely_llama import Config, count, shapes

from ..extras import counted, progress
from ..tokens import Tokenizer
from .layout import HUGGING_FACE, Layout, tensor
from .model import Checkpoint, widened

Row = dict[str, Any]


def describe(config: Config) -> dict[str, Any]:
    """What follows from the config alone."""
    heads = config.kv_heads * config.q_per_kv
    scaling = config.rope_scaling._asdict() if config.rope_scaling else None
    attention = {1: "multi-query"}.get(config.kv_heads, "grouped-query" if config.q_per_kv > 1 else "multi-head")
    return {
        "config": asdict(config) | {"rope_scaling": scaling},
        "attention": f"{attention}, {counted(heads, 'head')} over {config.kv_heads} of keys and values",
        "parameters": count(config),
        "bytes": {"float32": 4 * count(config), "bfloat16": 2 * count(config)},
    }


def rows(layout: Layout, config: Config) -> Iterator[Row]:
    """The path and shape of each parameter, with its name and shape in the file."""
    for path, leaf in jax.tree.leaves_with_path(shapes(config)):
        name, shape = tensor(layout, path, leaf.shape)
        yield {"ours": jax.tree_util.keystr(path), "shape": leaf.shape, "file": name, "file_shape": shape}


def config_report(config: Config) -> dict[str, Any]:
    """A report on a config without a file, with tensors in Hugging Face's format, all layers in one row."""
    found = list(rows(HUGGING_FACE, replace(config, layers=1)))
    last = f"0…{config.layers - 1}"
    for row in found:
        row["ours"], row["file"] = row["ours"].replace("[0]", f"[{last}]"), row["file"].replace(".0.", f".{last}.")
    return describe(config) | {"tensors": found}


def checkpoint_report(found: Checkpoint) -> dict[str, Any]:
    """A report on a checkpoint. Reads all tensors, one at a time."""
    stored, table = found.tensors, list(rows(found.layout, found.config))
    with progress(f"reading {found.file.name}", len(table)) as advance:
        for row in table:
            array = widened(found.get(row["file"]))
            good = np.isfinite(array)
            wrong = array.size - int(np.count_nonzero(good))
            norm = float(np.linalg.norm((array[good] if wrong else array).astype(np.float64)))
            row |= {"dtype": stored[row["file"]].dtype, "norm": norm, "not_finite": wrong}
            advance(1)
    dtypes = dict[str, int]()
    for kept in stored.values():
        dtypes[kept.dtype] = dtypes.get(kept.dtype, 0) + math.prod(kept.shape)
    fields = [{"name": name, "value": brief(value), "status": how} for name, (value, how) in found.fields.items()]
    return {
        "file": str(found.file),
        "format": found.format,
        **describe(found.config),
        "parameters_in_file": sum(math.prod(stored[row["file"]].shape) for row in table),
        "numbers_by_dtype": dtypes,
        "tied": found.config.tied,
        "rotary_pairs": "split into halves" if found.layout.half_split else "neighbours",
        "tokenizer": tell(found.tokenizer) if found.tokenizer else None,
        "fields": fields,
        "not_finite": sum(row["not_finite"] for row in table),
        "tensors": table,
    }


def brief(value: Any) -> Any:
    """A value, or the length of a long list."""
    if type(value) in (list, tuple, memoryview) and len(value) > 16:
        return f"{len(value):,} values"
    return value.tolist() if type(value) is memoryview else value


def tell(tokenizer: Tokenizer) -> dict[str, Any]:
    """A summary of a tokenizer."""
    names = {i: name for name, i in tokenizer.specials.items()}
    special = {name: None if i is None else f"{i} {names.get(i, '')}".strip() for name, i in
               (("bos", tokenizer.bos), ("eos", tokenizer.eos))}  # fmt: skip
    stops = [f"{i} {names.get(i, '')}".strip() for i in sorted(tokenizer.stops)]
    template = None if tokenizer.template is None else counted(len(tokenizer.template), "character", ",")
    return {"pieces": len(tokenizer.pieces), **special, "stops": stops, "adds_bos": tokenizer.adds_bos,
            "special": len(tokenizer.specials), "template": template,
            "sampling": tokenizer.sampling and tokenizer.sampling._asdict()}  # fmt: skip
