"""The command `inspect`: what a checkpoint declares, how each field is read, and its tensors beside our parameters."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lovely_llama import CONFIGS, Config, count, shapes

from .extras import progress
from .files import checkpoint
from .formats import Checkpoint, widened
from .layout import HUGGING_FACE, Layout, tensor
from .options import add_command, columns
from .tokens import Tokenizer

Row = dict[str, Any]


def add(commands: Any) -> None:
    """Add the command and its options."""
    command = add_command(commands, "inspect", "show what a checkpoint holds, and how it is read", inspect)
    known = "a file, a folder, a name on Hugging Face's hub, or of a published config such as llama-2-7b"
    command.add_argument("model", metavar="MODEL", help=known)
    command.add_argument("--json", action="store_true", help="print JSON")


def inspect(args: argparse.Namespace) -> None:
    """Print a report. Whatever in a checkpoint is not supported is an error, as in loading it."""
    if args.model in CONFIGS and not Path(args.model).exists():
        report = describe(CONFIGS[args.model]) | {"tensors": template(CONFIGS[args.model])}
    else:
        with checkpoint(args.model) as found:
            report = examine(found)
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n" if args.json else show(report))


def describe(config: Config) -> dict[str, Any]:
    """What follows from a config alone."""
    heads = config.kv_heads * config.q_per_kv
    scaling = config.rope_scaling._asdict() if config.rope_scaling else None
    attention = {1: "multi-query"}.get(config.kv_heads, "grouped-query" if config.q_per_kv > 1 else "multi-head")
    return {
        "config": asdict(config) | {"rope_scaling": scaling},
        "attention": f"{attention}, {heads} heads over {config.kv_heads} of keys and values",
        "parameters": count(config),
        "bytes": {"float32": 4 * count(config), "bfloat16": 2 * count(config)},
    }


def rows(layout: Layout, config: Config) -> Iterator[Row]:
    """Each parameter's path and shape beside its name and shape in the file."""
    for path, leaf in jax.tree.leaves_with_path(shapes(config)):
        name, shape = tensor(layout, path, leaf.shape)
        yield {"ours": jax.tree_util.keystr(path), "shape": leaf.shape, "file": name, "file_shape": shape}


def template(config: Config) -> list[Row]:
    """The rows of a model in Hugging Face's format that no file is given of: one for all layers."""
    found = list(rows(HUGGING_FACE, replace(config, layers=1)))
    last = f"0…{config.layers - 1}"
    for row in found:
        row["ours"], row["file"] = row["ours"].replace("[0]", f"[{last}]"), row["file"].replace(".0.", f".{last}.")
    return found


def examine(found: Checkpoint) -> dict[str, Any]:
    """A report on a checkpoint. All tensors are read, one at a time."""
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
    """A value that is fit to be shown: a long list by its length."""
    return f"{len(value):,} values" if isinstance(value, list | tuple) and len(value) > 16 else value  # pyright: ignore


def tell(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer has."""
    names = {i: name for name, i in tokenizer.specials.items()}
    special = {name: None if i is None else f"{i} {names.get(i, '')}".strip() for name, i in
               (("bos", tokenizer.bos), ("eos", tokenizer.eos))}  # fmt: skip
    stops = [f"{i} {names.get(i, '')}".strip() for i in sorted(tokenizer.stops)]
    template = None if tokenizer.template is None else f"{len(tokenizer.template):,} characters"
    return {"pieces": len(tokenizer.pieces), **special, "stops": stops, "adds_bos": tokenizer.adds_bos,
            "special": len(tokenizer.specials), "template": template,
            "sampling": tokenizer.sampling and tokenizer.sampling._asdict()}  # fmt: skip


def show(report: dict[str, Any]) -> str:
    """A report as text."""
    lines = list[str]()
    for name, value in report.items():
        if name in ("fields", "tensors"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {plain(item)}" for key, item in value.items())  # pyright: ignore
        lines.append(f"{name.replace('_', ' '):<20}{plain(value)}")
    if "fields" in report:
        lines += ["", *columns([(plain(f["name"]), plain(f["value"]), f["status"]) for f in report["fields"]])]
    head, numbers = ("parameter", "shape", "in the file", "shape"), ("dtype", "norm", "NaN or ∞")
    measured = "fields" in report
    table = [head + numbers if measured else head]
    for row in report["tensors"]:
        cells = (row["ours"], plain(row["shape"]), row["file"], plain(row["file_shape"]))
        table.append((*cells, row["dtype"], f"{row['norm']:.4g}", f"{row['not_finite']}") if measured else cells)
    return "\n".join([*lines, "", *columns(table), ""])


def plain(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, tuple | list):
        return " × ".join(map(plain, value)) if isinstance(value, tuple) else ", ".join(map(plain, value))  # pyright: ignore
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
