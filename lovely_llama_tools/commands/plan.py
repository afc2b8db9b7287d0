"""The command `plan`: whether a step fits on chips that need not exist, and what limits its speed."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lovely_llama import CONFIGS, Config, check

from ..devices.mesh import HELP, parse_mesh
from ..extras import counted, progress
from ..fast.layers import KEEP
from ..formats.files import checkpoint
from ..formats.model import DTYPES
from ..planning.chips import CHIPS, Slice, parse_chips
from ..planning.estimates import Task
from ..planning.plans import COMPILER, SHEET, Estimate, capacity, order, planned, ranked
from ..strict_json import to_json
from .options import MODEL, READ, READING, add_command, columns, reading, whole

FEW = 4  # meshes that a sweep compiles
SHOWN = 12  # meshes that a sweep shows of its ranking by formula
BOUNDS = "A step takes at least the longest of these times: tokens/s and utilisation are upper bounds."


def chips() -> list[str]:
    """A line for each known kind of chip."""
    rows = [
        (f"{name}:{'x'.join('4' * chip.axes)}", f"{chip.flops / 1e12:,.0f} TFLOP/s", f"{chip.memory / 2**30:.0f} GiB",
         f"slices of up to {chip.pod:,} chips in {chip.axes} dimensions")
        for name, chip in CHIPS.items()
    ]  # fmt: skip
    return columns([*rows, ("cpu:8", "", "", "devices that jax makes of a CPU, to try a plan")])


OPTIONS = {
    "model": {"model": dict(metavar="MODEL", help=f"a published config such as llama-3.1-8b; or {MODEL}"),
              **READ},
    "step": {
        "--batch": dict(type=whole, required=True, metavar="N", help="sequences per step, over all chips"),
        "--seq": dict(type=whole, required=True, metavar="N", help="tokens per sequence, or in each cache"),
        "--decode": dict(action="store_true", help="decode one token per sequence instead of a training step"),
        "--dtype": dict(choices=[*DTYPES], default="bfloat16", help="precision of the arithmetic (default: bfloat16)"),
        "--remat": dict(choices=[*KEEP], default="nothing", help="activations that a layer keeps for its gradient "
                        "(default: nothing but its input)"),
    },
    "devices": {
        "--chips": dict(required=True, help="kind and shape of the slice, as listed above"),
        "--mesh": dict(metavar="AXIS=N,…", help=HELP),
        "--sweep": dict(action="store_true", help=f"rank all meshes by estimate, and compile the best {FEW}"),
    },
    "output": {"--json": dict(action="store_true", help="print JSON")},
}  # fmt: skip
ABOUT = """Tell whether a training or decoding step fits on chips that need not exist, how fast it can be, and what
limits it. The step is compiled for the target; nothing runs, and no weights are read."""
EXAMPLES = """
lovely-llama plan stories15m --chips cpu:4 --mesh data=2,tensor=2 --batch 8 --seq 256
lovely-llama plan stories260k --chips cpu:4 --sweep --batch 8 --seq 256
lovely-llama plan llama-3.2-1b --chips v5e:2x2 --mesh tensor=4 --batch 4 --seq 2048 --decode
"""


def add(commands: Any) -> None:
    """Add the command."""
    what, extras = "tell whether a step fits on given chips", {"tpu": "the compiler for TPUs", **READING}
    about = "\n\n".join([ABOUT, "\n  ".join(["chips:", *chips()])])
    add_command(commands, "plan", what, plan, OPTIONS, about=about, examples=EXAMPLES, extras=extras)


def plan(args: argparse.Namespace) -> None:
    """Print a plan, or the plans of a sweep."""
    part, config = parse_chips(args.chips), config_of(args)
    task = Task(config, args.batch, args.seq, args.decode, args.dtype, args.remat)
    check("batch", task.batch, task.batch >= 1, "a whole number above 0")
    check("seq", task.seq, 1 <= task.seq <= config.ctx, f"1 to {config.ctx}, the model's context")
    check("mesh", args.mesh, bool(args.mesh) != args.sweep, "sizes of axes, such as fsdp=4,tensor=4; or --sweep")
    if not args.sweep:
        report = planned(task, part, parse_mesh(args.mesh), getattr(args, "debug", False))
        sys.stdout.write(to_json(report, indent=2) + "\n" if args.json else show(args.model, report))
        return
    found, candidates = list[dict[str, Any]](), ranked(task, part)
    if not args.json:
        print(by_formula(candidates), flush=True)  # compiling takes minutes
    with progress("compiling", len(candidates[:FEW]), delay=0) as advance:
        for one in candidates[:FEW]:
            found.append(planned(task, part, one.mesh, getattr(args, "debug", False)))
            advance(1)
    found.sort(key=order)
    sys.stdout.write(to_json(found, indent=2) + "\n" if args.json else ranking(found, part))


def config_of(args: argparse.Namespace) -> Config:
    """A published config, or that of a checkpoint, without reading tensors."""
    if args.model in CONFIGS and not Path(args.model).exists():
        return CONFIGS[args.model]
    with checkpoint(args.model, **reading(args)) as found:
        return found.config


# ---- As text ---------------------------------------------------------------------------------------------------------


def by_formula(candidates: Sequence[Estimate]) -> str:
    """Format the ranking of a sweep by formula as a table."""
    table: list[tuple[str, ...]] = [("mesh", "fits", "held", "sent", "seconds")]
    for one in candidates[:SHOWN]:
        spent = "" if one.seconds is None else f"{one.seconds:.3g}"
        table.append((mesh_name(one.mesh), "yes" if one.fits else "no", memory(one.held), memory(one.sent), spent))
    said = f"By formula: the best {len(table) - 1} of {len(candidates)}, per device and step."
    return "\n".join([*columns(table), "", said, ""])


def ranking(found: Sequence[dict[str, Any]], part: Slice) -> str:
    """Format what a sweep has compiled as a table."""
    table: list[tuple[str, ...]] = [("mesh", "fits", "peak", "bound by", "seconds", "tokens/s", "utilisation")]
    for report in found:
        peak = memory(report["peak"]) if "peak" in report else report["reason"]
        times = ["", "", "", ""]
        if "seconds" in report:
            spent, speed = max(report["seconds"].values()), report["tokens_per_second"]
            times = [report["bound"], f"{spent:.3g}", f"{speed:,.0f}", f"{report['utilisation']:.0%}"]
        table.append((mesh_name(report["mesh"]), "yes" if report["fits"] else "no", peak, *times))
    said = BOUNDS if part.chip else f"All {part.devices} devices share this machine's memory, {memory(capacity(part))}."
    return "\n".join(columns(table)) + f"\n\nCompiled: the best {len(found)} by formula. {said}\n"


def mesh_name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def memory(size: int | float) -> str:
    """Format bytes in the largest unit that gives a value of at least 1."""
    power = max(int(size).bit_length() - 1, 0) // 10
    return f"{size / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def show(model: str, report: dict[str, Any]) -> str:
    """Format a plan as text, with the source of each figure."""
    task, times = report["task"], report.get("seconds")
    what = "decoding one token for" if task["decode"] else "a training step of"
    rows = f"{counted(task['batch'], 'sequence', ',')} of {task['seq']:,}"
    head = f"{model}, {what} {rows}, {report['chips']}, {mesh_name(report['mesh'])}"
    sources: dict[str, str] = report["sources"]

    def row(name: str, what: str) -> list[tuple[str, str, str]]:
        return [(what, memory(report[name]), sources[name])] if report.get(name) else []

    rows = [("fits", "yes" if report["fits"] else "no", sources["fits"])]
    devices = math.prod(report["mesh"].values())
    rows += [*row("capacity", "memory, of all devices" if "together" in report else "memory"), *row("peak", "peak")]
    rows += [*row("together", f"peak of {counted(devices, 'device')}"), *row("arguments", "arguments")]
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
        f"Per device and step, except model FLOPs. {BOUNDS if times else ''}".strip(),
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
