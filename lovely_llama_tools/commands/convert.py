"""The command `convert`: from one checkpoint format to another."""

import argparse
import os
from pathlib import Path
from typing import Any

from lovely_llama import check

from ..formats.files import WRITERS, checkpoint, format_of, save
from ..formats.model import DTYPES
from ..formats.verifying import verified
from .options import MODEL, READ, READING, add_command, reading

STORED = [*dict.fromkeys(dtype for writer in WRITERS.values() for dtype in writer.dtypes)]
OPTIONS = {
    "checkpoints": {
        "source": dict(metavar="SRC", help=MODEL),
        "target": dict(metavar="DST", help="the new file or folder"),
        **READ,
    },
    "format": {
        "--to": dict(choices=[*WRITERS], help="format of DST (default: by its suffix .gguf or .bin, else hf)"),
        "--dtype": dict(choices=STORED, help="number format in DST (default: as in SRC, or the widest)"),
        "--drop": dict(
            metavar="FIELD", action="append", default=[],
            help="leave this out, such as template or tokenizer; may be repeated, or a list with commas. What DST has "
            "no place for is named on stderr, or refused unless dropped where token ids would change",
        ),
    },
    "result": {
        "--force": dict(action="store_true", help="replace DST: a file, or a folder that holds only a checkpoint"),
        "--verify": dict(action="store_true", help="also open DST with transformers or gguf, and print the error"),
    },
}  # fmt: skip
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
    with checkpoint(args.source, **reading(args)) as found:
        to = args.to or format_of(Path(args.target))
        check_apart(found.file, args.target, to)
        same = len({tensor.dtype for tensor in found.tensors.values()}) == 1
        model = found.load(found.dtype() if same and found.dtype() in DTYPES else "float32")
    save(model, args.target, to, args.dtype, args.force, drop=args.drop)
    target = Path(args.target)
    size = sum(path.stat().st_size for path in (target.rglob("*") if target.is_dir() else [target]))
    print(f"{target}: {size / 1e6:,.1f} MB")
    if args.verify:
        print(verified(model, target, to))


def check_apart(source: Path, target: str, to: str) -> None:
    """Refuse to write over the source, over a folder that it is in, or a folder into it."""
    old, new = (Path(os.path.realpath(path)) for path in (source, target))
    check("path", f"{source}, which is read", new != old, "another place", target)
    check("path", f"a folder with {source} in it, which is read", new not in old.parents, "another place", target)
    inside = to == "hf" and old in new.parents
    check("path", f"a folder within {source}, which is read", not inside, "another place", target)
