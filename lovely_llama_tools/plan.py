"""The command `plan`: whether a step of training or decoding fits on chips that are not there, and what limits it."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lovely_llama import CONFIGS, Config, LlamaError, check

from .chips import Slice, parse_chips
from .devices.partition import specs
from .estimates import Share, Task, computed_flops, meshes, model_flops, seconds
from .extras import progress
from .fast.layers import KEEP
from .files import checkpoint
from .formats import DTYPES
from .mesh import HELP, check_rows, check_seq, parse_mesh
from .options import add_command, columns, whole

FEW = 4  # meshes of a sweep that are compiled, the best by formula
# No TPU is looked for, nor kept from the other processes of this machine.
ABSENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
BOUNDS = "A step takes the longest of its times at least: tokens/s and utilisation are upper bounds."
COMPILER, FORMULA, SHEET = "compiler", "formula", "data sheet"
SOURCES = {
    **dict.fromkeys(("fits", "peak", "arguments", "temporaries", "collectives"), COMPILER),
    **dict.fromkeys(("gradients", "kept", "moved", "model_flops"), FORMULA),
    "held": "shardings",
}


def add(commands: Any) -> None:
    """Add the command and its options."""
    command = add_command(commands, "plan", "tell whether a step fits on chips that are not there", plan)
    known = "a published config such as llama-3.1-8b; or a file, a folder, or a name on Hugging Face's hub"
    command.add_argument("model", metavar="MODEL", help=known)
    command.add_argument("--chips", required=True, help="such as v5e:4x4, v5p:16x16x16, or cpu:8 for devices of a CPU")
    command.add_argument("--mesh", metavar="AXIS=N,…", help=HELP)
    command.add_argument("--sweep", action="store_true", help=f"rank the meshes that divide; compile the best {FEW}")
    command.add_argument("--batch", type=whole, required=True, metavar="N", help="rows of a step, of all chips")
    command.add_argument("--seq", type=whole, required=True, metavar="N", help="tokens of a row, or of its cache")
    command.add_argument("--decode", action="store_true", help="one token for each row, in place of a training step")
    command.add_argument("--dtype", choices=[*DTYPES], default="bfloat16", help="of the arithmetic (default: bfloat16)")
    command.add_argument("--remat", choices=[*KEEP], default="nothing", help="what a layer keeps (default: nothing)")
    command.add_argument("--json", action="store_true", help="print JSON")


def plan(args: argparse.Namespace) -> None:
    """Print a plan, or those of a sweep."""
    part, config = parse_chips(args.chips), config_of(args.model)
    task = Task(config, args.batch, args.seq, args.decode, args.dtype, args.remat)
    check("batch", task.batch, task.batch >= 1, "a whole number above 0")
    check("seq", task.seq, 1 <= task.seq <= config.ctx, f"1 to {config.ctx}, the model's context")
    check("mesh", args.mesh, bool(args.mesh) != args.sweep, "sizes of axes, such as fsdp=4,tensor=4; or --sweep")
    if not args.sweep:
        report = planned(task, part, parse_mesh(args.mesh), getattr(args, "debug", False))
        sys.stdout.write(json.dumps(report, indent=2) + "\n" if args.json else show(args.model, report))
        return
    found, candidates = list[dict[str, Any]](), ranked(task, part)
    with progress("compiling", len(candidates[:FEW])) as advance:
        for sizes in candidates[:FEW]:
            found.append(planned(task, part, sizes, getattr(args, "debug", False)))
            advance(1)
    found.sort(key=order)
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else ranking(found, len(candidates)))


def config_of(name: str) -> Config:
    """A published config, or that of a checkpoint, of which no tensor is read."""
    if name in CONFIGS and not Path(name).exists():
        return CONFIGS[name]
    with checkpoint(name) as found:
        return found.config


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
        return report | {"fits": total * part.devices <= capacity(part)}
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
    check("mesh", f"{devices} devices", devices == part.devices, f"{part.devices}, as {part} has")
    check("mesh", f"seq={seq}", not task.decode or seq == 1, "seq=1: in decoding, a row has one token")
    check_rows(task.batch, sizes)
    check_seq(task.seq, sizes)
    specs(task.config, sizes)


def compiled(task: Task, part: Slice, sizes: dict[str, int], debug: bool) -> dict[str, Any]:
    """The compiler's answer, from a process of its own, which neither sees this one's devices nor prints anything."""
    request = {"task": fields_of(task), "chips": str(part), "mesh": sizes}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths, **ABSENT}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "lovely_llama_tools.compiling", json.dumps(request)], text=True,
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


def ranked(task: Task, part: Slice) -> list[dict[str, int]]:
    """The meshes over which everything divides, the best by formula first."""
    found = [sizes for sizes in meshes(part.devices) if divides(task, part, sizes)]
    check("mesh", "no mesh", bool(found), f"one of {part.devices} devices that divides batch, seq and model")

    def key(sizes: dict[str, int]) -> tuple[bool, float]:
        share = Share(task, sizes)
        times = seconds(part, computed_flops(task) / part.devices, share.moved, {2: share.sent})
        return share.held > capacity(part) / (1 if part.chip else part.devices), max(times.values(), default=share.sent)

    return sorted(found, key=key)


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


def ranking(found: Sequence[dict[str, Any]], candidates: int) -> str:
    """A sweep as a table."""
    table: list[tuple[str, ...]] = [("mesh", "fits", "peak", "bound by", "seconds", "tokens/s", "utilisation")]
    for report in found:
        peak = memory(report["peak"]) if "peak" in report else report["reason"]
        times = ["", "", "", ""]
        if "seconds" in report:
            spent, speed = max(report["seconds"].values()), report["tokens_per_second"]
            times = [report["bound"], f"{spent:.3g}", f"{speed:,.0f}", f"{report['utilisation']:.0%}"]
        table.append((mesh_name(report["mesh"]), "yes" if report["fits"] else "no", peak, *times))
    return "\n".join(columns(table)) + f"\n\nCompiled: the best {len(found)} of {candidates} by formula. {BOUNDS}\n"


# ---- As text ---------------------------------------------------------------------------------------------------------


def mesh_name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def memory(size: int | float) -> str:
    """Bytes in the largest unit of which there is one at least."""
    power = max(int(size).bit_length() - 1, 0) // 10
    return f"{size / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def show(model: str, report: dict[str, Any]) -> str:
    """A plan as text: each figure with where it is from."""
    task, times = report["task"], report.get("seconds")
    what = "decoding a token for each of" if task["decode"] else "a training step on"
    head = f"{model}, {what} {task['batch']:,} rows of {task['seq']:,}, {report['chips']}, {mesh_name(report['mesh'])}"
    sources: dict[str, str] = report["sources"]

    def row(name: str, what: str) -> list[tuple[str, str, str]]:
        return [(what, memory(report[name]), sources[name])] if report.get(name) else []

    rows = [("fits", "yes" if report["fits"] else "no", sources["fits"])]
    rows += [*row("capacity", "memory"), *row("peak", "peak"), *row("arguments", "arguments")]
    rows += [(f"  {name}", memory(size), sources["held"]) for name, size in report["held"].items()]
    rows += [*row("temporaries", "temporaries"), *row("gradients", "  gradients"), *row("kept", "  kept by layers")]
    rows.append(("model FLOPs, all", f"{report['model_flops']:.4g}", sources["model_flops"]))
    if "flops" in report:
        rows.append(("FLOPs", f"{report['flops']:.4g}", sources["flops"]))
    rows += row("moved", "memory traffic")
    if times:
        both = zip(times.items(), ("flops", "moved", "collectives"), strict=True)
        rows += [(f"time of {name}", f"{spent:.3g} s", f"{sources[of]}, {SHEET}") for (name, spent), of in both]
        rows += [("bound by", report["bound"], ""), ("tokens/s, all", f"{report['tokens_per_second']:,.0f}", ""),
                 ("utilisation", f"{report['utilisation']:.1%} of the data sheet's FLOP/s", "")]  # fmt: skip
    rows.append(("compiled in", f"{report['compile_seconds']:.0f} s", "measured here"))
    reason = [report["reason"], ""] if report["reason"] else []
    below = [
        *traffic(report),
        "",
        f"Of a device and a step, but for model FLOPs. {BOUNDS if times else ''}".strip(),
        "",
    ]
    return "\n".join([head, "", *reason, *columns(rows), *below])


def traffic(report: dict[str, Any]) -> list[str]:
    """The collectives of a step, by kind."""
    if not report.get("collectives"):
        return []
    kinds = dict[str, list[float]]()
    for one in report["collectives"]:
        sums = kinds.setdefault(one["kind"], [0, 0])
        sums[0], sums[1] = sums[0] + one["times"], sums[1] + one["sent"]
    ranked = sorted(kinds.items(), key=lambda item: -item[1][1])
    table = [(f"collectives ({COMPILER})", "a step", "sent by a device")]
    table += [(kind, f"{times:,.0f}", memory(sent)) for kind, (times, sent) in ranked]
    return ["", *columns(table)]
