"""The command `lm-eval`: the command line of EleutherAI's lm-eval, which knows our models as `lovely-llama`."""

import argparse
from functools import partial
from typing import Any

from ..inference.harness import lm_eval
from .options import READING, Arguments, add_command

OPTIONS = {
    "lm-eval": {
        "words": dict(nargs="*", metavar="ARGUMENT", help="what lm-eval takes: lovely-llama lm-eval run --help"),
    },
}
ABOUT = """Run lm-eval's own command line, which has `lovely-llama` among its model types. Model arguments: pretrained,
dtype and batch_size. `lovely-llama evaluate --tasks` is shorter."""
EXAMPLES = """
lovely-llama lm-eval run --model lovely-llama --model_args pretrained=run/best --tasks own --include_path tasks
lovely-llama lm-eval run --help
"""


def add(commands: Any) -> None:
    """Add the command."""
    what, extras = "lm-eval's own command line, with --model lovely-llama", {"eval": "lm-eval itself", **READING}
    command = add_command(commands, "lm-eval", what, None, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=extras)
    command.prefix_chars = "\0"  # options are for lm-eval: to this parser they are words
    command.set_defaults(run=partial(run, command))


def run(command: Arguments, args: argparse.Namespace) -> None:
    """Hand over to lm-eval, which may end the process itself."""
    words = [word for word in args.words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        command.print_help()
    else:
        lm_eval(words)
