"""The command `diff`: which known bug explains the logits of somebody else's Llama."""

import argparse
from pathlib import Path
from typing import Any

from ..comparing.diff import diff
from ..comparing.theirs import read_theirs
from ..formats.files import load
from ..strict_json import nulled, to_json
from .options import MODEL, READING, add_command

OPTIONS = {
    "model": {"model": dict(metavar="MODEL", help=MODEL)},
    "theirs": {
        "theirs": dict(metavar="THEIRS", help="what another program computed from that model: npz, safetensors or JSON "
                       "lines with tokens and logits"),
        "--dtype": dict(choices=("float32", "bfloat16", "float16"), help="in which theirs were computed "
                        "(default: read off the numbers)"),
    },
    "output": {"--json": dict(action="store_true", help="print JSON")},
}  # fmt: skip
ABOUT = """Compare logits that another program computed with the reference's, and name the known bug, or the number that
is not the right one, that explains the difference. The exit status is 0 if they are the same but for rounding, 1 if
they differ, 2 for bad input, 3 for a fault while running."""
EXAMPLES = """
lovely-llama trace run/best --text "To be" --only logits --out t.safetensors && lovely-llama diff run/best t.safetensors
lovely-llama trace run/best --tokens "3 1 4" --out t.safetensors && lovely-llama diff run/best t.safetensors --json
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "name the bug in another program's Llama from its logits"
    command = add_command(commands, "diff", what, run, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=READING)
    command.set_defaults(fault=3)


def run(args: argparse.Namespace) -> int:
    """Judge a recording."""
    tokens, logits = read_theirs(Path(args.theirs))
    verdict = diff(load(args.model), logits, tokens, dtype=args.dtype)
    print(to_json(nulled(verdict._asdict()), indent=2, ensure_ascii=False) if args.json else verdict)
    return int(verdict.verdict != "same")
