"""Cases I: several devices, and several processes that train one model."""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from builders import TINY, random_params
from faults import Accepted, Case, Done, TooLong, Unlike, Variant, World, ends
from training import rows

from lovely_llama_tools import children, launch
from lovely_llama_tools.files import save
from lovely_llama_tools.formats import Model
from lovely_llama_tools.interrupts import PARENT

MODEL = "--layers 1 --dim 4 --heads 2 --hidden-dim 6"
COURSE = "--vocab 11 --ctx 4 --batch 2 --sample 0 --lr 0.01 --steps 3 --eval-every 3"
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# A process of the command line, with its own arguments besides those of all, and its own code before.
PROCESS = """
import os, shlex, sys, lovely_llama_tools.__main__ as program
from removal import remove
remove(REMOVED)
exec(os.environ["BEFORE"])
sys.argv += shlex.split(os.environ["OWN"])
sys.exit(program.run())
"""


def tokens(world: World, name: str = "tokens", seed: int = 0) -> Path:
    path = world.folder / f"{name}.npy"
    np.save(path, np.random.default_rng(seed).integers(0, 11, 200).astype(np.uint16))
    return path


def model(world: World, name: str, seed: int = 0) -> Path:
    save(Model(TINY, random_params(TINY, seed=seed), None), world.folder / name, "hf")
    return world.folder / name


def launched(world: World, common: str, *own: str, before: Mapping[int, str] | None = None) -> Done:
    """`launch` two processes, with the same guards removed."""
    code, places = PROCESS.replace("REMOVED", repr(dict(world.removed))), launch.places
    more = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}  # programs that compile fast

    def placed(count: int, devices: int) -> list[dict[str, str]]:
        each = enumerate(zip(places(count, devices), own or ("", ""), strict=True))
        return [place | more | {"OWN": words, "BEFORE": (before or {}).get(i, "")} for i, (place, words) in each]

    world.patch.setattr(launch, "again", lambda words: [sys.executable, "-P", "-c", code, *words])
    world.patch.setattr(launch, "places", placed)
    return world.main("launch", "-n", 2, "--", "train", *common.split())


def trains(world: World) -> None:
    """Each process may have its own folder: only process 0 writes."""
    done = launched(world, f"{tokens(world)} {MODEL} {COURSE}", *(f"--out {world.folder}/run{i}" for i in range(2)))
    assert done.status == 0, done.err
    assert len(rows(world.folder / "run0")) == 3 and not (world.folder / "run1").exists()


# ---- I4: a process that ends, or does not come -----------------------------------------------------------------------

PLAYER = f"import os; own = int(os.environ['{PARENT}']); exec(os.environ['PART'])"
WAITS = r"os.write(own, b'here\n'); os.read(own, 1)"  # for the others, as long as there is a parent
OVERDUE = {"lovely_llama_tools.children:Watch.overdue": "lambda self: False"}
SILENT = {"lovely_llama_tools.children:Watch.verdict": "lambda self: 1"}
AT_STEP_2 = """
import lovely_llama_tools.train as train
step, calls = train.step, []
def struck(*arguments):
    calls.append(1)
    return step(*arguments) if len(calls) < 3 else os.kill(os.getpid(), 9)
train.step = struck
"""


def played(process: int, says: str, *parts: str) -> Variant:
    """The parent ends all processes and names one; here they only play their part."""

    def act(world: World) -> Done:
        watched = functools.partial(children.watched, wait=1.0)
        world.patch.setattr(launch, "again", lambda _: [sys.executable, "-I", "-S", "-c", PLAYER])
        world.patch.setattr(launch, "places", lambda *_: [{"PART": part} for part in parts])
        world.patch.setattr(launch, "watched", watched)
        return world.main("launch", "-n", len(parts), "--", "train")

    return ends(act, 1, f"process {process}", says, OVERDUE, TooLong)


def killed(world: World) -> Done:
    """Process 0, without which the runtime aborts the others. For process 1, and resuming, see test_launch.py."""
    common = f"{tokens(world)} {MODEL} {COURSE} --out {world.folder}/run"
    return launched(world, common, before={0: AT_STEP_2})


# ---- I5: processes that were started with something else -------------------------------------------------------------

UNCOMPARED = {"lovely_llama_tools.cluster:agree_on": "lambda marks_of: None"}
OTHER_CODE = "import lovely_llama_tools.train as train; train.code = lambda: 'other'"


def unlike(key: str, common: str, *own: str, before: str = "", end: type[BaseException] = Accepted) -> Variant:
    """Process 1 is refused, by the name of what it has otherwise, before the first step."""

    def act(world: World) -> Done:
        files = {"DATA": tokens(world), "ELSE": tokens(world, "others", 1), "RUN": world.folder / "run"}
        if "MODEL" in common + "".join(own):
            files |= {"MODEL1": model(world, "one"), "MODEL2": model(world, "two", 1)}

        def filled(words: str) -> str:
            return functools.reduce(lambda text, name: text.replace(name, str(files[name])), files, words)

        done = launched(world, filled(common + " --out RUN"), *map(filled, own), before={1: before})
        assert not (world.folder / "run" / "metrics.jsonl").exists() or not done.status
        return done

    return ends(act, 2, key, "^error: process 1: .*, as process 0 has$", UNCOMPARED, end)


CASES: dict[str, Case] = {
    "I4": Case(
        "C", "a process is killed, or never starts",
        {
            "before it joins": played(1, "got signal 9", WAITS, "os.kill(os.getpid(), 9)"),
            "never joins": played(1, "got no word in 1 seconds", WAITS, "os.read(own, 1)"),
            "never ends": played(1, "got no end", "pass", "os.read(own, 1)"),
            "at work": ends(killed, 1, "process 0", "got signal 9, expected status 0; --resume", SILENT, Unlike),
        },
        trains,
    ),
    "I5": Case(
        "S", "processes with other code, options, data or weights",
        {
            "options": unlike("beta1", f"DATA {MODEL} {COURSE}", "", "--beta1 0.8"),
            "data": unlike("data", f"{MODEL} {COURSE}", "DATA", "ELSE"),
            "weights": unlike("weights", f"DATA {COURSE}", "--init-from MODEL1", "--init-from MODEL2", end=Unlike),
            "code": unlike("code", f"DATA {MODEL} {COURSE}", before=OTHER_CODE),
        },
        trains,
    ),
}  # fmt: skip
