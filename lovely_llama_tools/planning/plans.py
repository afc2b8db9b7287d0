"""A plan: what the compiler, formulas and data sheets say of a step on a mesh; and the meshes that are worth one."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from ..devices.mesh import check_rows, check_seq
from ..devices.partition import specs
from ..extras import counted
from ..strict_json import to_json
from .chips import Slice
from .estimates import Share, Task, computed_flops, meshes, model_flops, seconds

# No TPU is looked for, nor kept from the other processes of this machine.
ABSENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
COMPILER, FORMULA, SHEET = "compiler", "formula", "data sheet"
SOURCES = {
    **dict.fromkeys(("fits", "peak", "arguments", "temporaries", "collectives", "together"), COMPILER),
    **dict.fromkeys(("gradients", "kept", "moved", "model_flops"), FORMULA),
    "held": "shardings",
}


# ---- One plan --------------------------------------------------------------------------------------------------------


def planned(task: Task, part: Slice, sizes: dict[str, int], debug: bool) -> dict[str, Any]:
    """What the compiler, formulas and the data sheet say of a step on a mesh."""
    check_mesh(task, part, sizes)
    said, share = compiled(task, part, sizes, debug), Share(task, sizes)
    held: dict[str, float] = said["held"]
    report: dict[str, Any] = {
        "task": fields_of(task), "chips": str(part), "mesh": sizes,
        "fits": said["fits"], "reason": said.get("reason"), "held": held,
        **{name: said[name] for name in ("compile_seconds", "compile_cpu_seconds")},
        "gradients": 0 if task.decode else held["weights"], "kept": 0 if task.decode else share.kept,
        "moved": share.moved, "model_flops": model_flops(task), "capacity": capacity(part),
        "sources": SOURCES | {"capacity": SHEET if part.chip else "this machine"},
    }  # fmt: skip
    if not said["fits"]:
        return report
    sizes_of, exact = said["memory"], said["flops"] if not said["endless"] else 0
    total = sum(sizes_of[f"{name}_size"] for name in ("argument", "output", "temp")) - sizes_of["alias_size"]
    report["sources"]["flops"] = COMPILER if exact else FORMULA
    report |= {
        "peak": sizes_of["peak_memory"] if part.chip else total,
        "arguments": sizes_of["argument_size"], "temporaries": sizes_of["temp_size"],
        "flops": float(exact) or computed_flops(task) / part.devices, "collectives": said["collectives"],
    }  # fmt: skip
    if part.chip is None:
        together, shared = total * part.devices, f"{counted(part.devices, 'device')} share this machine's memory"
        fits = together <= capacity(part)
        return report | {"fits": fits, "reason": None if fits else shared, "together": together}
    sent = dict[int, float]()
    for one in said["collectives"]:
        sent[one["links"]] = sent.get(one["links"], 0) + one["sent"]
    times = seconds(part, report["flops"], share.moved, sent)
    step = max(times.values())
    peak = part.devices * part.chip.flops / part.chip.devices
    return report | {
        "seconds": times, "bound": max(times, key=lambda name: times[name]),
        "tokens_per_second": task.tokens / step, "utilisation": model_flops(task) / step / peak,
    }  # fmt: skip


def fields_of(task: Task) -> dict[str, Any]:
    """A task for JSON."""
    return task._asdict() | {"config": asdict(task.config)}


def capacity(part: Slice) -> float:
    """Bytes of a device's memory; of a CPU, of all devices together."""
    if part.chip:
        return part.chip.memory / part.chip.devices
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_mesh(task: Task, part: Slice, sizes: dict[str, int]) -> None:
    """Refuse a mesh of another number of devices, or one that does not divide the rows, their tokens or the model."""
    devices, seq = math.prod(sizes.values()), sizes["seq"]
    check("mesh", counted(devices, "device"), devices == part.devices, f"{part.devices}, as {part} has")
    check("mesh", f"seq={seq}", not task.decode or seq == 1, "seq=1: in decoding, a row has one token")
    check_rows(task.batch, sizes)
    check_seq(task.seq, sizes)
    specs(task.config, sizes)


def compiled(task: Task, part: Slice, sizes: dict[str, int], debug: bool) -> dict[str, Any]:
    """The compiler's answer, from a process of its own, which neither sees this one's devices nor prints anything."""
    request = {"task": fields_of(task), "chips": str(part), "mesh": sizes}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths, **ABSENT}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "lovely_llama_tools.planning.compiling", to_json(request)], text=True,
        env=os.environ | environment, stdin=subprocess.PIPE,  # when it closes, the compiler ends
        stdout=subprocess.PIPE, stderr=None if debug else subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout
        answer = process.stdout.read()
    if not answer:
        raise ChildProcessError(f"the compiler ended with status {process.returncode}; --debug shows what it printed")
    result = json.loads(answer)
    if "error" in result:
        raise LlamaError(*result["error"])
    return result


# ---- A sweep ---------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """An estimate for a mesh by formula alone. There are no seconds for CPUs, which have no data sheet here."""

    mesh: dict[str, int]
    held: float  # bytes, by a device
    fits: bool
    sent: float  # bytes, by a device
    seconds: float | None


def ranked(task: Task, part: Slice) -> list[Estimate]:
    """The meshes over which everything divides, the best by formula first."""
    found = [sizes for sizes in meshes(part.devices) if divides(task, part, sizes)]
    check("mesh", "no mesh", bool(found), f"one of {counted(part.devices, 'device')} that divides batch, seq and model")

    def estimate(sizes: dict[str, int]) -> Estimate:
        share = Share(task, sizes)
        times = seconds(part, computed_flops(task) / part.devices, share.moved, {2: share.sent})
        fits = share.held <= capacity(part) / (1 if part.chip else part.devices)
        return Estimate(sizes, share.held, fits, share.sent, max(times.values(), default=None))

    return sorted(
        map(estimate, found), key=lambda one: (not one.fits, one.sent if one.seconds is None else one.seconds)
    )


def divides(task: Task, part: Slice, sizes: dict[str, int]) -> bool:
    """Whether a mesh divides the batch, its rows and the model."""
    try:
        check_mesh(task, part, sizes)
    except LlamaError:
        return False
    return True


def order(report: dict[str, Any]) -> tuple[bool, float, float]:
    """What fits first, then the fastest, then the smallest."""
    spent = max(report.get("seconds", {}).values(), default=0.0)
    return not report["fits"], spent, float(report.get("peak", 0))
