"""The command `diff`: the known bug behind what somebody else's Llama computed, or what their checkpoint changed."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from lovely_llama import check

from ..comparing.checkpoints.tensors import diff_models
from ..comparing.diff import default_prompt, diff
from ..comparing.recordings.server import read_server
from ..comparing.recordings.theirs import Recorded, read_theirs
from ..formats.files import is_model, load
from ..formats.model import Model
from ..strict_json import nulled, to_json
from .options import MODEL, READ, READING, add_command, numbers, reading

OPTIONS = {
    "model": {"model": dict(metavar="MODEL", help=f"{MODEL}; or a folder made by golden, of which the answers of all "
                            "bugs are known beforehand"),
              **READ},
    "theirs": {
        "theirs": dict(metavar="THEIRS", help="what another program computed from that model: a file or a folder of "
                       "tokens with logits, activations or both; or a server, such as http://localhost:8000/v1; or "
                       "another model"),
        "--tokens": dict(metavar="IDS", help="token ids to ask a server about (default: forty)"),
        "--dtype": dict(choices=("float32", "bfloat16", "float16"), help="in which theirs were computed "
                        "(default: read off the numbers; of a server float32)"),
        "--pairs": dict(type=float, default=0.0, metavar="SECONDS", help="where no bug explains theirs, look so long "
                        "for two at once"),
    },
    "output": {"--json": dict(action="store_true", help="print JSON")},
}  # fmt: skip
ABOUT = """Compare what another program computed with the reference's, and name the known bug, or the number that is not
the right one, that explains the difference. THEIRS is npz, safetensors, JSON lines, a file of torch.save, or a folder
of such: SGLang's dumps, transformers' debug tree. Of another model, tensors are compared. The exit status is 0 if they
are the same but for rounding, 1 if they differ, 2 for bad input, 3 for a fault while running."""
EXAMPLES = """
lovely-llama trace run/best --text "To be" --only logits --out t.safetensors && lovely-llama diff run/best t.safetensors
lovely-llama trace run/best --tokens "3 1 4" --out t.safetensors && lovely-llama diff run/best t.safetensors --json
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "name the bug in another program's Llama from what it computed"
    command = add_command(commands, "diff", what, run, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=READING)
    command.set_defaults(fault=3)


def run(args: argparse.Namespace) -> int:
    """Judge a recording, a server or a model."""
    server = re.match("https?://", args.theirs) is not None
    check("tokens", args.tokens, server or args.tokens is None, "none: a recording has its own")
    check("pairs", args.pairs, 0 <= args.pairs < np.inf, "seconds")
    if not server and is_model(Path(args.theirs)):
        ours = load(args.model, "float32", allow_nonfinite=True, **reading(args))
        theirs = load(args.theirs, "float32", allow_nonfinite=True, allow=args.allow)
        verdict: Any = diff_models(ours, theirs)
    else:
        model, found = asked(args) if server else (model_of(args), read_theirs(Path(args.theirs)))
        verdict = diff(
            model, found.logits, found.tokens, activations=found.activations, dtype=args.dtype, pairs=args.pairs,
            log_probabilities=found.log_probabilities,
        )  # fmt: skip
    print(to_json(nulled(verdict._asdict()), indent=2, ensure_ascii=False) if args.json else verdict)
    return int(verdict.verdict != "same")


def model_of(args: argparse.Namespace) -> Model | str:
    """The model, or where it is: beside one that `golden` made are the answers."""
    how = reading(args)
    return load(args.model, **how) if any(how.values()) else args.model


def asked(args: argparse.Namespace) -> tuple[Model, Recorded]:
    """The model, and what a server says of the same tokens."""
    model = load(args.model, **reading(args))
    tokens = default_prompt(model.config) if args.tokens is None else numbers(args.tokens)
    return model, read_server(args.theirs, tokens, model.tokenizer, model.config.vocab)
