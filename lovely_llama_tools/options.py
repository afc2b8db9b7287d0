"""The parts of the command line: a parser that raises, numbers in plain decimal notation, and the common options."""

import argparse
import re
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from lovely_llama import LlamaError, check

from .mesh import make_mesh, parse_mesh

MESH = (
    "devices by axis, such as data=2,tensor=4: tensor divides layers and their caches, fsdp the storage of parameters, "
    "and data, with fsdp, the rows of many prompts"
)
DEBUG: dict[str, Any] = {"action": "store_true", "help": "show the traceback of an error"}


class Arguments(argparse.ArgumentParser):
    """A parser that raises LlamaError in place of printing its usage."""

    def error(self, message: str) -> Any:
        unquoted = re.match("unrecognized arguments: [^-]", message)
        raise LlamaError("arguments", self.prog, message, "one PROMPT, in quotes" if unquoted else "what --help says")


def number(text: str) -> float:
    """A decimal number. float() would accept nan, inf and 1_0 as well."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return float(text)


def whole(text: str) -> int:
    """A whole number in decimal digits."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def add_mesh(command: Arguments) -> None:
    """Add the option --mesh to a command that does not train."""
    command.add_argument("--mesh", metavar="AXIS=N,…", help=MESH)


def chosen_mesh(text: str | None) -> Mesh | None:
    """The mesh of the option --mesh."""
    if text is None:
        return None
    sizes = parse_mesh(text)
    check("mesh", f"seq={sizes['seq']}", sizes["seq"] == 1, "1: tokens are divided in training alone")
    return make_mesh(sizes)


def ids(text: str, path: object) -> list[int]:
    """A text of token ids, for a model without a tokenizer."""
    expected = "a tokenizer.json, .model or .bin beside the model, or token ids in place of text, such as '1 15043'"
    good = re.fullmatch(r"\s*\d{1,18}([\s,]+\d{1,18})*\s*", text, re.ASCII)
    check("tokenizer", "none", bool(good), expected, path)
    return [int(word) for word in re.findall(r"\d+", text)]


def add_command(commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int | None]) -> Arguments:
    """Add a command to the parser's: what it does, and the function that runs it, which may return an exit status."""
    command = commands.add_parser(name, help=what, description=what + ".", allow_abbrev=False)
    command.add_argument("--debug", **DEBUG | {"default": argparse.SUPPRESS})
    command.set_defaults(run=run)
    return command


def columns(table: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
