"""A training run, killed and resumed over and over: it must end with the same bits as one that nobody touched.

    ./dev soak            twenty kills, and ten each by Ctrl-C and SIGTERM
    ./dev soak N          as many kills, and half as many each of the others

A kill comes at a random step, plus up to 50 ms, so that it also hits evaluations and checkpoints being written. By the
clock alone it could come before the first new checkpoint every time, and nothing would ever move.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

SAVE, EVALUATE, STEPS = 5, 20, 16  # steps between checkpoints, between evaluations, and for each kill
MODEL = f"--layers 1 --dim 8 --heads 2 --hidden-dim 12 --ctx 8 --batch 4 --sample 0 --lr 1e-2 --save-every {SAVE}"
PATIENCE = 120  # seconds until a run has to move
QUICK = "--xla_backend_optimization_level=0"  # it runs for seconds
START = multiprocessing.get_context("forkserver")  # which imports once what every process needs
PRELOADED = ["lovely_llama_tools.commands", "matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboardX"]


class Verdict(NamedTuple):
    """What came of a run."""

    hits: int  # signals that reached it before its end
    faults: list[str]

    def __str__(self) -> str:
        return f"{self.hits} times, {'the same bits' if not self.faults else '; '.join(self.faults)}"


def program(arguments: list[str], folder: str) -> None:
    """The command line, in a process of its own, that keeps its programs in this folder."""
    from lovely_llama_tools.__main__ import run

    os.environ |= {"XDG_CACHE_HOME": folder, "XLA_FLAGS": QUICK}
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    sys.argv = ["lovely-llama", *arguments]
    sys.exit(run())


def start(folder: Path, *arguments: str) -> BaseProcess:
    """Start it."""
    process = START.Process(target=program, args=(["train", *arguments], str(folder)))
    process.start()
    return process


def step_of(run: Path) -> int:
    """The last step that a run has written down."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name[5:]) for path in run.glob("step-*"))


def bits(run: Path) -> str:
    """The SHA-256 of the last checkpoint's parameters and moments."""
    last = run / f"step-{saved(run)[-1]}"
    data = [(last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    return hashlib.sha256(b"".join(data)).hexdigest()


def strike(process: BaseProcess, run: Path, number: int, rng: random.Random) -> bool:
    """Wait for a random step, and then for some milliseconds more, and send a signal; False if it had ended."""
    target, limit = max(saved(run), default=0) + rng.randint(1, 2 * SAVE), time.monotonic() + PATIENCE
    while step_of(run) < target and process.is_alive():
        assert time.monotonic() < limit, f"{run}: no step {target} in {PATIENCE} seconds"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    if process.is_alive() and process.pid:
        os.kill(process.pid, number)
    process.join(PATIENCE)
    return process.exitcode != 0


def soak(folder: Path, strikes: int, number: int, seed: int = 0) -> Verdict:
    """Train twice, once with so many interruptions, and compare."""
    from lovely_llama_tools.training.run_folder import is_good

    START.set_forkserver_preload(PRELOADED)
    rng, run, whole, faults, hits = random.Random(seed), folder / "run", folder / "whole", list[str](), 0
    text = folder / "sums.txt"
    text.write_text("".join(f"{a}+{b}={a + b}\n" for a in range(10) for b in range(10)))
    options = [str(text), *MODEL.split(), "--steps", str(STEPS * (strikes + 1)), "--eval-every", str(EVALUATE)]
    unbroken = start(folder, *options, "--out", str(whole))
    unbroken.join()
    while hits < strikes:
        again = ["--resume"] if (run / "run.json").exists() else options
        process = start(folder, *again, "--out", str(run))
        if not strike(process, run, number, rng):
            break
        hits += 1
        faults += [f"step-{n} cannot be read" for n in saved(run) if not is_good(run / f"step-{n}")]
        if number != signal.SIGKILL and process.exitcode != 128 + number:
            faults.append(f"exit status {process.exitcode}")
        if number != signal.SIGKILL and saved(run)[-1] < step_of(run):
            faults.append(f"step {step_of(run)} lost")
    process = start(folder, "--resume", "--out", str(run))
    process.join()
    faults += [f"exit status {ended.exitcode} at the end" for ended in (unbroken, process) if ended.exitcode]
    faults += [f"{path.name} left behind" for path in run.glob(".*.part")]
    if bits(run) != bits(whole):
        faults.append("other bits")
    return Verdict(hits, faults)


def main() -> int:
    parser = argparse.ArgumentParser("./dev soak", description=__doc__)
    parser.add_argument("kills", metavar="N", nargs="?", type=int, default=20)
    kills, failed = parser.parse_args().kills, False
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed processes leave semaphores to its care
    for number, strikes in ((signal.SIGKILL, kills), (signal.SIGINT, kills // 2), (signal.SIGTERM, kills // 2)):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            verdict = soak(Path(folder), strikes, number)
        failed = failed or bool(verdict.faults) or verdict.hits < strikes
        print(f"{number.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
