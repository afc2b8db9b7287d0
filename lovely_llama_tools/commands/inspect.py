"""The command `inspect`: a report on a checkpoint, as text or JSON."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lovely_llama import CONFIGS

from ..formats.files import checkpoint
from ..formats.report import checkpoint_report, config_report
from ..strict_json import nulled, to_json
from .options import MODEL, READ, READING, add_command, columns, reading

OPTIONS = {
    "model": {"model": dict(metavar="MODEL", help=f"{MODEL}; or a published config such as llama-2-7b"), **READ},
    "output": {"--json": dict(action="store_true", help="print JSON")},
}
ABOUT = """Show the config of a checkpoint, how each of its fields is interpreted, its tokenizer, and its tensors beside
our parameters, with norms."""
EXAMPLES = """
lovely-llama inspect llama-3.1-8b
lovely-llama inspect run/best
lovely-llama inspect run/best --json
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "show what a checkpoint holds"
    add_command(commands, "inspect", what, inspect, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=READING)


def inspect(args: argparse.Namespace) -> None:
    """Print a report. Anything unsupported in a checkpoint is an error, as it is for `load`."""
    if args.model in CONFIGS and not Path(args.model).exists():
        report = config_report(CONFIGS[args.model])
    else:
        with checkpoint(args.model, **reading(args)) as found:
            report = checkpoint_report(found)
    sys.stdout.write(to_json(nulled(report), indent=2, ensure_ascii=False) + "\n" if args.json else show(report))


def show(report: dict[str, Any]) -> str:
    """Format a report as text."""
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
    """Format a value on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, tuple | list):
        return " × ".join(map(plain, value)) if isinstance(value, tuple) else ", ".join(map(plain, value))  # pyright: ignore
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
