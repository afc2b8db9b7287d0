"""The command `convert`: from one checkpoint format to another."""

import argparse
from pathlib import Path
from typing import Any

from ..formats.files import WRITERS, checkpoint, save
from ..formats.model import DTYPES
from .options import MODEL, READING, add_command

STORED = [*dict.fromkeys(dtype for writer in WRITERS.values() for dtype in writer.dtypes)]
OPTIONS = {
    "checkpoints": {
        "source": dict(metavar="SRC", help=MODEL),
        "target": dict(metavar="DST", help="the new file or folder"),
    },
    "format": {
        "--to": dict(choices=[*WRITERS], help="format of DST (default: by its suffix .gguf or .bin, else hf)"),
        "--dtype": dict(choices=STORED, help="number format in DST (default: as in SRC, or the widest)"),
        "--force": dict(action="store_true", help="replace DST if it exists"),
    },
}
EXAMPLES = """
lovely-llama convert run/best model.gguf
lovely-llama convert run/best small.gguf --dtype q8_0
lovely-llama convert run/best folder --to hf --dtype bfloat16
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "write a checkpoint in another format"
    add_command(commands, "convert", what, convert, OPTIONS, examples=EXAMPLES, extras=READING)


def convert(args: argparse.Namespace) -> None:
    """Load in a dtype that represents every tensor exactly, and save."""
    with checkpoint(args.source) as found:
        same = len({tensor.dtype for tensor in found.tensors.values()}) == 1
        model = found.load(found.dtype() if same and found.dtype() in DTYPES else "float32")
    save(model, args.target, args.to, args.dtype, args.force)
    target = Path(args.target)
    size = sum(path.stat().st_size for path in (target.rglob("*") if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:,.1f} MB")
