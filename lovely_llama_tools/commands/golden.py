"""The command `golden`: tiny Llamas on which every known bug shows, with all that a correct program computes."""

import argparse
from typing import Any

from ..comparing.golden import golden
from .options import add_command

OPTIONS = {"output": {"out": dict(metavar="OUT", help="the new folder")}}
ABOUT = """Write the probe: three tiny random Llamas, as folders of Hugging Face's, as GGUF, and one as llama2.c's .bin,
such that every bug of the catalogue shows in their logits; beside each its prompt, logits, every intermediate, every
gradient, a step of AdamW, and cached decoding; the exact distributions of samplers, and cases for a tokenizer.
manifest.json describes it. For whoever has no checkpoint at hand, or a large one, or no Python."""
EXAMPLES = """
lovely-llama golden probe
"""
EXTRAS = {"chat": "the GGUF files"}


def add(commands: Any) -> None:
    """Add the command."""
    what = "write tiny Llamas with all they compute, to check a program against"
    add_command(commands, "golden", what, run, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=EXTRAS)


def run(args: argparse.Namespace) -> None:
    """Write the probe."""
    golden(args.out)
    print(args.out)
