"""Parts that commands share: the parser, numbers in plain decimal notation, common options, and the form of help."""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from lovely_llama import LlamaError, check

from ..devices.mesh import make_mesh, parse_mesh
from ..extras import PACKAGES

Options = Mapping[str, Mapping[str, dict[str, Any]]]  # by group and name: the arguments of `add_argument`

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
IDS = re.compile(r"\s*\d{1,18}([\s,]+\d{1,18})*\s*", re.ASCII)
MODEL = "a file, a folder, or a name on Hugging Face's hub"
MESH = (
    "split over devices, such as data=2,tensor=4: tensor splits layers and their caches, fsdp the storage of "
    "parameters; data and fsdp split a batch of prompts"
)
GENERAL: dict[str, dict[str, Any]] = {
    "-h --help": dict(action="help", help="show this help"),
    "--debug": dict(action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"),
}
# How a model is read, by every command that reads one.
READ: dict[str, dict[str, Any]] = {
    "--base": dict(metavar="BASE", help="of an adapter in PEFT's format, its base (default: the one that it names)"),
    "--allow": dict(metavar="FIELD", action="append", default=[],
                    help="read on although the model's config has this field, which is unknown; may be repeated"),
}  # fmt: skip
ORBAX = "--checkpoints orbax, the default for several devices"
# What each extra adds to a command that reads models.
READING = {
    "chat": "GGUF files, tokenizer.json, chat templates, progress bars",
    "hub": "models by name from Hugging Face's hub",
    "torch": "files of PyTorch: Meta's .pth, llama2.c's .pt",
    "scale": "checkpoints that orbax wrote",
}


class Arguments(argparse.ArgumentParser):
    """A parser that raises LlamaError in place of printing its usage."""

    def error(self, message: str) -> Any:
        unquoted = re.match("unrecognized arguments: [^-]", message)
        raise LlamaError("arguments", self.prog, message, "one PROMPT, in quotes" if unquoted else "what --help says")


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs; lines of an indented block, such as examples, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.split("\n\n")
        return "\n\n".join(b if "\n  " in b else super(Formatter, self)._fill_text(b, width, indent) for b in blocks)


def number(text: str) -> float:
    """A decimal number. float() would accept nan, inf and 1_0 as well."""
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return float(text)


def whole(text: str) -> int:
    """A whole number in decimal digits."""
    if not WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that `READ` has set."""
    return {"base": args.base, "allow": args.allow}


def chosen_mesh(text: str | None) -> Mesh | None:
    """The mesh that --mesh asks for, if any."""
    if text is None:
        return None
    sizes = parse_mesh(text)
    check("mesh", f"seq={sizes['seq']}", sizes["seq"] == 1, "1: tokens are divided in training alone")
    return make_mesh(sizes)


def ids(text: str, path: object) -> list[int]:
    """Parse token ids, given in place of text to a model without a tokenizer."""
    expected = "a tokenizer.json, .model or .bin beside the model, or token ids in place of text, such as '1 15043'"
    check("tokenizer", "none", bool(IDS.fullmatch(text)), expected, path)
    return numbers(text)


def numbers(text: str) -> list[int]:
    """Token ids, with spaces or commas between."""
    check("tokens", f"{text!r:.60}", bool(IDS.fullmatch(text)), "token ids, such as '1 15043'")
    return [int(word) for word in re.findall(r"\d+", text)]


def describe(
    parser: Arguments, options: Options, about: str, examples: str, extras: Mapping[str, str] | None = None
) -> None:
    """Add options in their groups, then those that every command has; and what its help says before and after them."""
    for title, group in {**options, "general": {**options.get("general", {}), **GENERAL}}.items():
        section = parser.add_argument_group(title)
        for name, settings in group.items():
            section.add_argument(*name.split(), **settings)
    known = {extra: f"{says} (pip install {shlex.join(PACKAGES[extra])})" for extra, says in (extras or {}).items()}
    parts = {"examples": examples.strip().splitlines(), "extras": [f"{name:<7} {says}" for name, says in known.items()]}
    parser.description = about
    parser.epilog = "\n\n".join("\n  ".join([f"{title}:", *lines]) for title, lines in parts.items() if lines)


def add_command(
    commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int | None] | None, options: Options,
    *, about: str = "", examples: str, extras: Mapping[str, str] | None = None,
) -> Arguments:  # fmt: skip
    """Add a command: a phrase that says what it does, the function that runs it, which may return an exit status, and
    its help. Without a function it prints its help, such as one that has commands of its own."""
    command: Arguments = commands.add_parser(
        name, help=what, formatter_class=Formatter, allow_abbrev=False, add_help=False
    )
    describe(command, options, about or f"{what[0].upper()}{what[1:]}.", examples, extras)
    command.set_defaults(run=run or prints_help(command))
    return command


def prints_help(parser: Arguments) -> Callable[[argparse.Namespace], None]:
    """What a command does that has commands of its own."""
    return lambda args: parser.print_help()


def add_subcommands(command: Arguments, name: str) -> Any:
    """Let a command have commands of its own."""
    return command.add_subparsers(title="commands", dest=name, metavar=name.upper(), parser_class=Arguments)


def columns(table: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
