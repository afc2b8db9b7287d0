"""The command `convert`: a checkpoint in one format to a checkpoint in another."""

import argparse
from pathlib import Path
from typing import Any

from .files import WRITERS, checkpoint, save
from .formats import DTYPES
from .options import add_command


def add(commands: Any) -> None:
    """Add the command and its options."""
    command = add_command(commands, "convert", "write the checkpoint SRC in another format to DST", convert)
    command.add_argument("source", metavar="SRC", help="a file, a folder, or a name on Hugging Face's hub")
    command.add_argument("target", metavar="DST", help="a new file, or a new folder in Hugging Face's format")
    named = "by DST's name: .gguf, .bin for llama2.c, else hf"
    command.add_argument("--to", choices=WRITERS, help=f"the format (default: {named})")
    dtypes = dict.fromkeys(dtype for writer in WRITERS.values() for dtype in writer.dtypes)
    command.add_argument("--dtype", choices=dtypes, help="how numbers are stored (default: as in SRC, or the widest)")
    command.add_argument("--force", action="store_true", help="replace what is there")


def convert(args: argparse.Namespace) -> None:
    """Load in the dtype that holds every tensor exactly, and save."""
    with checkpoint(args.source) as found:
        same = len({tensor.dtype for tensor in found.tensors.values()}) == 1
        model = found.load(found.dtype() if same and found.dtype() in DTYPES else "float32")
    save(model, args.target, args.to, args.dtype, args.force)
    target = Path(args.target)
    size = sum(path.stat().st_size for path in (target.rglob("*") if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:,.1f} MB")
