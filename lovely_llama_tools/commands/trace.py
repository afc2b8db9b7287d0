"""The command `trace`: every intermediate of a run, in one file."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lovely_llama import LlamaError, check

from ..comparing.naming import NAMINGS, renamed
from ..comparing.trace import trace
from ..formats.files import load
from ..formats.publishing import check_new, write_whole
from ..formats.safetensors import write_arrays
from ..inference.generate import encode_prompt
from .options import MODEL, READ, READING, add_command, numbers, reading

OPTIONS = {
    "model": {"model": dict(metavar="MODEL", help=MODEL), **READ},
    "tokens": {
        "--tokens": dict(metavar="IDS", help="token ids, such as '1 15043 29892'"),
        "--text": dict(metavar="TEXT", help="a text in their place, with BOS where the model adds it"),
    },
    "output": {
        "--out": dict(metavar="FILE", required=True, help="the new safetensors file"),
        "--only": dict(metavar="NAME", nargs="+", help="some names only, such as layers.0.q norm logits"),
        "--gradients": dict(action="store_true", help="in place of the values, the gradients with respect to them of "
                            "the mean cross-entropy of each token given those before it"),
        "--names": dict(choices=tuple(NAMINGS), help="the names, shapes and order of rotary rows of another program; "
                        "what it has no name for is left out"),
        "--force": dict(action="store_true", help="replace FILE if it exists"),
    },
}  # fmt: skip
ABOUT = """Write every intermediate of a run by one name each: embed; layers.N.attn_norm, q, q_rotated, k, k_rotated, v,
scores, weights, heads, attn, ffn_norm, gate, up, act, ffn, out; norm, logits; and the tokens. Heads come first, then
tokens, then features. scores are masked by -inf; act is silu(gate) * up; a layer adds attn and ffn to its input, which
gives out."""
EXAMPLES = """
lovely-llama trace run/best --text "To be, or not to be" --out trace.safetensors
lovely-llama trace run/best --tokens "1 5 7 2" --only layers.0.q --names hf --out q.safetensors
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "write every intermediate of a run into a file"
    add_command(commands, "trace", what, run, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=READING)


def run(args: argparse.Namespace) -> None:
    """Trace a model on some tokens."""
    given = [text for text in (args.tokens, args.text) if text is not None]
    check("tokens", "both --tokens and --text" if given else "none", len(given) == 1, "--tokens or --text")
    check_new(Path(args.out), args.force)
    model = load(args.model, **reading(args))
    if args.text is None:
        tokens = numbers(args.tokens)
    elif model.tokenizer:
        tokens = encode_prompt(model.tokenizer, args.text, model.config.ctx)
    else:
        raise LlamaError(args.model, "tokenizer", "none", "a tokenizer.json, .model or .bin beside it, or --tokens")
    found = trace(model, tokens, args.only, gradients=args.gradients)
    arrays = renamed(found, NAMINGS[args.names], model.config) if args.names else found
    check("names", args.only, bool(arrays), f"some that {args.names} has too")
    write_whole(Path(args.out), lambda part: write_arrays(part, {"tokens": np.asarray(tokens, np.int32), **arrays}))
    print(args.out)
