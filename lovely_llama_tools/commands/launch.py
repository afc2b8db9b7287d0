"""The command `launch`: several processes on this machine train one model together."""

import argparse
from typing import Any

from lovely_llama import check

from ..devices.cluster import environments
from ..devices.processes import again, watched
from .options import ORBAX, add_command, whole

MOST = 4096


OPTIONS = {
    "processes": {
        "-n": dict(type=whole, required=True, metavar="N", help="number of processes"),
        "--devices-per-process": dict(type=whole, default=1, metavar="D", help="GPUs, or parts of the CPU, for each "
                                      "process (default: 1)"),
    },
    "command": {
        "words": dict(nargs="+", metavar="-- train", help="`train` with its arguments; see lovely-llama train --help"),
    },
}  # fmt: skip
ABOUT = """Start `train` as N processes on this machine that train one model together. If one of them fails, all end. On
several machines, start `train` on each, as docs/scale.md describes."""
EXAMPLES = """
lovely-llama launch -n 2 -- train book.txt --steps 500 --out run
lovely-llama launch -n 2 --devices-per-process 2 -- train book.txt --mesh data=2,fsdp=2 --out run
"""


def add(commands: Any) -> None:
    """Add the command."""
    what = "train with several processes on this machine"
    add_command(commands, "launch", what, launch, OPTIONS, about=ABOUT, examples=EXAMPLES, extras={"scale": ORBAX})


def launch(args: argparse.Namespace) -> int:
    """Start the processes, and watch them until they end."""
    for name in ("n", "devices_per_process"):
        value = getattr(args, name)
        check(name, value, 0 < value <= MOST, f"a whole number from 1 to {MOST}", "arguments")
    check("command", args.words[0], args.words[0] == "train", "train", "arguments")
    return watched(again(args.words), environments(args.n, args.devices_per_process))
