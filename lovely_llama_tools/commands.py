"""The command line: which commands there are, and how each ends."""

import os
import sys
from collections.abc import Sequence

from lovely_llama import LlamaError, __version__

from . import convert, evaluate, inspect, launch, plan, plot, talk, tokenize, train
from .interrupts import tell
from .options import DEBUG, Arguments

COMMANDS = (talk, train, launch, plan, evaluate, plot, convert, inspect, tokenize)


def arguments() -> Arguments:
    """The commands and their options."""
    parser = Arguments(prog="lovely-llama", allow_abbrev=False, description="Run Llama models.")
    parser.add_argument("--version", action="version", version=f"lovely-llama {__version__}")
    parser.add_argument("--debug", **DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Arguments)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: its status; or 2 for bad input and 1 for a fault while running, with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
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
        line = "error: " + " ".join(said.split())
        if not tell(line):
            print(line, file=sys.stderr)
        return 2 if isinstance(error, LlamaError) else 1
    return 0
