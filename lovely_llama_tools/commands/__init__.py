"""The command line: a module for each command, and `main`, which runs them.

Commands parse arguments and print; what they do stands in the other wings, none of which imports from here.
"""

import os
import sys
from collections.abc import Sequence

from lovely_llama import LlamaError, __version__

from ..interrupts import tell_error
from ..tokens.base import note
from . import chat, convert, diff, evaluate, golden, inspect, launch, lm_eval, plan, plot, tokenize, trace, train
from .options import Arguments, Formatter, add_subcommands, describe, prints_help

COMMANDS = (chat, train, launch, plan, evaluate, lm_eval, plot, diff, trace, golden, convert, inspect, tokenize)


ABOUT = "Llama models: talk to them, train them, convert, measure and inspect them. Each command has its own --help."
EXAMPLES = """
lovely-llama chat "Why is the sky blue?"
lovely-llama train book.txt --steps 500 --out run
lovely-llama generate "Once upon a time" --model run/best
"""
VERSION = dict(action="version", version=f"lovely-llama {__version__}", help="show the version")


def arguments() -> Arguments:
    """The parser of all commands and their options."""
    parser = Arguments(prog="lovely-llama", formatter_class=Formatter, allow_abbrev=False, add_help=False)
    parser.set_defaults(run=prints_help(parser), debug=False)
    commands = add_subcommands(parser, "command")
    for module in COMMANDS:
        module.add(commands)
    describe(parser, {"general": {"--version": VERSION}}, ABOUT, EXAMPLES)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for bad input, 1 for a fault while running (3 where 1 is a command's
    result), each with one line on stderr."""
    argv, args = sys.argv[1:] if argv is None else argv, None
    note.cache_clear()  # what a command tells, it tells once
    try:
        args = arguments().parse_args(argv)
        return args.run(args) or 0
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--debug" in argv:
            raise
        known = isinstance(error, LlamaError | OSError | ArithmeticError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        message, status = " ".join(said.split()), 2 if isinstance(error, LlamaError) else getattr(args, "fault", 1)
        if not tell_error(message, status):
            print(f"error: {message}", file=sys.stderr)
        return status
    return 0
