"""Cases I: several devices, and several processes that train one model."""

import functools
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from builders import TINY, random_params
from faults import Accepted, Case, Done, TooLong, Unlike, Variant, World, ends, guarded, refused
from small_runs import rows
from soak import QUICK

from lovely_llama import Config
from lovely_llama_tools.commands import launch
from lovely_llama_tools.data.batches import Windows
from lovely_llama_tools.devices import processes as children
from lovely_llama_tools.devices.mesh import check_seq
from lovely_llama_tools.devices.partition import specs
from lovely_llama_tools.formats.files import save
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.interrupts import PARENT

MODEL = "--layers 1 --dim 4 --heads 2 --hidden-dim 6"
SCHEDULE = "--vocab 11 --ctx 4 --batch 2 --sample 0 --lr 0.01 --steps 3 --eval-every 3"
# Nothing is drawn and no events are written, whose packages take longer to import than jax.
UNSEEN = {
    ".training.metrics:MetricsLogger.draw": "lambda self: None",
    ".training.metrics:extra": "lambda module, name: __import__('unittest.mock').mock.Mock() "
    "if module == 'tensorboardX' else original(module, name)",
}
# A process of the command line, with its own arguments besides those of all, and its own code before.
PROCESS = """
import os, shlex, sys, lovely_llama_tools.__main__ as program
sys.path.insert(0, FOLDER)
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
    values = {"REMOVED": {**UNSEEN, **world.removed}, "FOLDER": str(Path(__file__).parent)}
    code, places = re.sub("REMOVED|FOLDER", lambda name: repr(values[name[0]]), PROCESS), launch.environments
    more = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}  # programs that compile fast

    def placed(count: int, devices: int) -> list[dict[str, str]]:
        each = enumerate(zip(places(count, devices), own or ("", ""), strict=True))
        return [place | more | {"OWN": words, "BEFORE": (before or {}).get(i, "")} for i, (place, words) in each]

    world.patch.setattr(launch, "again", lambda words: [sys.executable, "-P", "-c", code, *words])
    world.patch.setattr(launch, "environments", placed)
    return world.main("launch", "-n", 2, "--", "train", *common.split())


def trains(world: World) -> None:
    """Each process may have its own folder: only process 0 writes."""
    common = f"{tokens(world)} {MODEL} {SCHEDULE} --checkpoints hf"
    done = launched(world, common, *(f"--out {world.folder}/run{i}" for i in range(2)))
    assert done.status == 0, done.err
    assert len(rows(world.folder / "run0")) == 3 and not (world.folder / "run1").exists()


# ---- I1: meshes that do not fit --------------------------------------------------------------------------------------

SHAPE = Config(32, 16, 2, 4, 2, 10, 24, 8, 1e-5, 1e4, None, True)


def indivisible(field: str, size: int, **mesh: int) -> Variant:
    """A model with this size for a field is split over a mesh that does not divide it: refused by the field's name."""
    return refused(lambda _: specs(replace(SHAPE, **{field: size}), mesh), field, "expected a multiple of")


def meshed(mesh: str, field: str, end: type[BaseException] = Accepted, more: str = "") -> Variant:
    """Training on a mesh, with the one device that there is here."""

    def act(world: World) -> Done:
        options = f"{MODEL} {SCHEDULE} {more} --out {world.folder}/run --mesh".split()
        return world.main("train", tokens(world), *options, mesh)

    return ends(act, 2, field, end=end)


# ---- I2 and I3: the same on other devices ----------------------------------------------------------------------------

EIGHT = "--layers 1 --dim 16 --heads 8 --kv-heads 4 --hidden-dim 24 --vocab 12 --ctx 8 --batch 8 --micro-batch 4"
STEPS = "--sample 0 --lr 0.01 --steps 20 --eval-every 20 --save-every 10 --keep 3 --val-fraction 0"
BEGUN_AGAIN = {".training.checkpoints:restore": "lambda *a: (new := original(*a))._replace(moments="
               "jax.tree.map(jnp.zeros_like, new.moments))"}  # fmt: skip
FIRST_ROW = {".training.loop:spread": "lambda ids, *more: original(ids[[0] * len(ids)], *more)"}
ALL_ROWS = {".data.batches:Split.batch": "lambda self, seed, step, rows, own=None: "
            "original(self, seed, step, rows)"}  # fmt: skip


def on(world: World, devices: int, *arguments: object) -> list[float]:
    """The losses of a run in a process with so many devices, the guards removed."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    own = replace(world, removed={**UNSEEN, **world.removed})
    process = own.start("train", *arguments, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return losses(Path(str(arguments[arguments.index("--out") + 1])))


UNBROKEN = dict[tuple[object, ...], Path]()  # runs with every guard in its place, which variants compare theirs with


def unbroken(world: World, devices: int, *mesh: str) -> Path:
    """Twenty steps on so many devices, run once."""
    if (devices, *mesh) not in UNBROKEN:
        own = replace(world, folder=world.talker.parent, removed={})
        run = own.folder / f"{devices} devices"
        on(own, devices, tokens(own), *EIGHT.split(), *STEPS.split(), *mesh, "--out", run)
        UNBROKEN[devices, *mesh] = run
    return UNBROKEN[devices, *mesh]


def losses(run: Path) -> list[float]:
    return [row["train_loss"] for row in rows(run)]


def resumed(devices: int, mesh: str) -> Variant:
    """A run on eight devices goes on, from its middle, on fewer."""

    def act(world: World) -> None:
        whole = unbroken(world, 8, "--mesh", "data=2,fsdp=2,tensor=2")
        run = shutil.copytree(whole, world.folder / "run", symlinks=True)
        got = on(world, devices, "--resume", "step-10", "--mesh", mesh, "--out", run)
        np.testing.assert_allclose(got, losses(whole), 1e-5)

    return guarded(act, BEGUN_AGAIN)


def sharded(mesh: str) -> Variant:
    """Twenty steps on eight devices, and on one."""

    def act(world: World) -> None:
        options = [*EIGHT.split(), *STEPS.split(), "--mesh", mesh, "--out", world.folder / "eight"]
        got = on(world, 8, tokens(world), *options)
        np.testing.assert_allclose(got, losses(unbroken(world, 1)), 1e-5)

    return guarded(act, FIRST_ROW)


def divided(world: World) -> None:
    """Rows of a batch, read by four processes: disjoint, and together those of one."""
    ids = np.arange(200, dtype=np.uint16)
    locked: Any = Memory(ids)
    split = Windows(locked, 0, 200, 4)
    whole = split.batch(1, 2, 8)
    parts = [split.batch(1, 2, 8, range(i, 8, 4)) for i in range(4)]
    assert all(len(part.tokens) == 2 for part in parts)
    for name in ("tokens", "targets"):
        joined = np.stack([getattr(part, name) for part in parts], 1).reshape(8, 4)
        np.testing.assert_array_equal(joined, getattr(whole, name))


class Memory:
    """Tokens that are in memory."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def read(self, start: int, count: int) -> Any:
        return self.ids[start : start + count]


# ---- I4: a process that ends, or does not come -----------------------------------------------------------------------

PLAYER = f"import os; own = int(os.environ['{PARENT}']); exec(os.environ['PART'])"
WAITS = r"os.write(own, b'here\n'); os.read(own, 1)"  # for the others, as long as there is a parent
OVERDUE = {".devices.processes:Watch.overdue": "lambda self: False"}
SILENT = {".devices.processes:Watch.verdict": "lambda self: 1"}
AT_STEP_2 = """
import lovely_llama_tools.training.loop as loop
step, calls = loop.step, []
def struck(*arguments):
    calls.append(1)
    return step(*arguments) if len(calls) < 3 else os.kill(os.getpid(), 9)
loop.step = struck
"""


def played(process: int, says: str, *parts: str) -> Variant:
    """The parent ends all processes and names one; here they only play their part."""

    def act(world: World) -> Done:
        watched = functools.partial(children.watched, wait=1.0)
        world.patch.setattr(launch, "again", lambda _: [sys.executable, "-I", "-S", "-c", PLAYER])
        world.patch.setattr(launch, "environments", lambda *_: [{"PART": part} for part in parts])
        world.patch.setattr(launch, "watched", watched)
        return world.main("launch", "-n", len(parts), "--", "train")

    return ends(act, 1, f"process {process}", says, OVERDUE, TooLong)


def killed(world: World) -> Done:
    """Process 0, without which the runtime aborts the others. For process 1, and resuming, see test_launch.py."""
    common = f"{tokens(world)} {MODEL} {SCHEDULE} --out {world.folder}/run"
    return launched(world, common, before={0: AT_STEP_2})


# ---- I5: processes that were started with something else -------------------------------------------------------------

UNCOMPARED = {".devices.cluster:agree_on": "lambda marks_of: None"}
OTHER_CODE = "import lovely_llama_tools.training.loop as loop; loop.code = lambda: 'other'"


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
    "I1": Case(
        "C", "a mesh that is not one, or does not divide the model or the batch",
        {
            "vocab": indivisible("vocab", 30, tensor=4),
            "heads": indivisible("q_per_kv", 2, tensor=8),
            "hidden_dim": indivisible("hidden_dim", 22, tensor=4),
            "dim": indivisible("dim", 14, fsdp=4),
            "batch": meshed("data=3", "batch", Unlike),
            "micro-batch": meshed("data=2", "micro_batch", Unlike, "--micro-batch 1"),
            "tokens of a row": refused(lambda _: check_seq(4, {"seq": 3}), "ctx", "a multiple of 3"),
            "more devices than there are": meshed("data=2", "mesh", Unlike),
            "no axis": meshed("heads=2", "mesh"),
            "an axis twice": meshed("data=1,data=1", "mesh"),
            "no size": meshed("data", "mesh"),
            "no devices": meshed("data=0", "mesh", Unlike),
            "a fraction": meshed("data=1.5", "mesh"),
            "blanks": meshed("data=1, tensor=1", "mesh"),
        },
        trains,
    ),
    "I2": Case(
        "S", "more or fewer devices after a resume",
        {"four": resumed(4, "fsdp=2,tensor=2"), "one": resumed(1, "data=1")},
        trains,
    ),
    "I3": Case(
        "S", "sharded, and on one device",
        {
            "data, fsdp, tensor": sharded("data=2,fsdp=2,tensor=2"),
            "fsdp, seq": sharded("fsdp=4,seq=2"),
            "rows of each process": guarded(divided, ALL_ROWS),
        },
        trains,
    ),
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
            "options": unlike("beta1", f"DATA {MODEL} {SCHEDULE}", "", "--beta1 0.8"),
            "data": unlike("data", f"{MODEL} {SCHEDULE}", "DATA", "ELSE"),
            "weights": unlike("weights", f"DATA {SCHEDULE}", "--init-from MODEL1", "--init-from MODEL2"),
            "code": unlike("code", f"DATA {MODEL} {SCHEDULE}", before=OTHER_CODE),
        },
        trains,
    ),
}  # fmt: skip
