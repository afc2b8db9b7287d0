"""The command `launch`: processes on this machine that train one model together."""

import argparse
import socket
from typing import Any

from lovely_llama import check

from .children import again, watched
from .cluster import ADDRESS, COUNT, INDEX
from .options import add_command, whole

MOST = 4096
DEVICES, CPUS = "JAX_LOCAL_DEVICE_IDS", "JAX_NUM_CPU_DEVICES"


def add(commands: Any) -> None:
    """Add the command and its options."""
    command = add_command(commands, "launch", "run `train` as N processes on this machine that train one model", launch)
    command.add_argument("-n", type=whole, required=True, metavar="N", help="processes")
    devices = "devices of each: GPUs, or parts of the CPU (default: 1)"
    command.add_argument("--devices-per-process", type=whole, default=1, metavar="D", help=devices)
    command.add_argument("words", nargs="+", metavar="-- train", help="the command, with its arguments")


def launch(args: argparse.Namespace) -> int:
    """Start the processes, and see them to their end."""
    for name in ("n", "devices_per_process"):
        value = getattr(args, name)
        check(name, value, 0 < value <= MOST, f"a whole number from 1 to {MOST}", "arguments")
    check("command", args.words[0], args.words[0] == "train", "train", "arguments")
    return watched(again(args.words), places(args.n, args.devices_per_process))


def places(count: int, devices: int) -> list[dict[str, str]]:
    """What the environment tells each process: where the others are, and which devices are its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {ADDRESS: address, "JAX_COORDINATOR_BIND_ADDRESS": address, COUNT: str(count), CPUS: str(devices)}
    own = [range(i * devices, (i + 1) * devices) for i in range(count)]
    return [{**shared, INDEX: str(i), DEVICES: ",".join(map(str, ids))} for i, ids in enumerate(own)]
