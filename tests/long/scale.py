"""Plans for slices of TPUs, by `lovely-llama plan`: the tables of docs/scale.md.

./dev scale            print them, in about twenty minutes
./dev scale --write    put them into docs/scale.md
"""

import argparse
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scale.md"
LIBTPU = ROOT / ".venv" / "tpu" / "libtpu" / "libtpu.so"


class Row(NamedTuple):
    """What is planned."""

    model: str
    chips: str
    mesh: str
    batch: int
    seq: int
    decode: bool = False


PLANS = [
    Row("llama-3.2-1b", "v5e:4x4", "fsdp=4,tensor=4", 16, 2048),
    Row("llama-3.1-8b", "v5e:16x16", "fsdp=64,tensor=4", 128, 8192),
    Row("llama-3.1-70b", "v5p:8x8x8", "fsdp=64,tensor=8", 512, 8192),
    Row("llama-3.1-405b", "v5p:16x16x16", "fsdp=512,tensor=8", 1024, 8192),
    Row("llama-3.2-1b", "v5e:4x4", "data=2,tensor=8", 64, 8192, True),
    Row("llama-3.1-8b", "v5e:16x16", "data=32,tensor=8", 256, 8192, True),
    Row("llama-3.1-70b", "v5p:8x8x8", "data=64,tensor=8", 1024, 8192, True),
    Row("llama-3.1-405b", "v5p:16x16x16", "data=256,tensor=16", 512, 8192, True),
]
SLICES = {64: "4x4x4", 512: "8x8x8", 4096: "16x16x16"}
SPLIT = {64: "fsdp=64", 512: "fsdp=64,tensor=8", 4096: "fsdp=512,tensor=8"}
STRONG = [Row("llama-3.1-70b", f"v5p:{shape}", SPLIT[n], 512, 4096) for n, shape in SLICES.items()]
WEAK = [Row("llama-3.1-70b", f"v5p:{shape}", f"fsdp={n // 8},tensor=8", n, 4096) for n, shape in SLICES.items()]
TABLES = {"plans": PLANS, "strong": STRONG, "weak": WEAK}


@cache
def planned(row: Row) -> dict[str, Any]:
    """What the command says of a row."""
    words = [row.model, "--chips", row.chips, "--mesh", row.mesh, "--batch", str(row.batch), "--seq", str(row.seq)]
    command = [sys.executable, "-m", "lovely_llama_tools", "plan", *words, "--json", *["--decode"] * row.decode]
    done = subprocess.run(
        command, env={"TPU_LIBRARY_PATH": str(LIBTPU), **os.environ}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def given(row: Row) -> list[str]:
    """What a row of a table is about."""
    kind = "decoding" if row.decode else "training"
    return [f"{row.model}, {kind}", row.chips, row.mesh, f"{row.batch:,} × {row.seq:,}"]


def cells(report: dict[str, Any]) -> list[str]:
    """The figures of a row of a table."""
    fits, took = "yes" if report["fits"] else f"no: {report['reason']}", f"{report['compile_cpu_seconds']:.0f} s"
    if "seconds" not in report:
        return [fits, *[""] * 7, took]
    times = [f"{float(f'{1000 * spent:.3g}'):,g}" for spent in report["seconds"].values()]
    peak, speed = f"{report['peak'] / 2**30:.1f} GiB", f"{report['tokens_per_second']:,.0f}"
    return [fits, peak, *times, report["bound"], speed, f"{report['utilisation']:.1%}", took]


def table(rows: list[Row]) -> str:
    """Plans as Markdown."""
    head = ["plan", "chips", "mesh", "batch", "fits", "peak", "compute", "memory", "interconnect", "bound by",
            "tokens/s", "utilisation", "compiled in"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([*given(row), *cells(planned(row))])
        print(*lines[-1], file=sys.stderr, flush=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def marks(name: str) -> tuple[str, str]:
    """Between which a table stands in the page."""
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev scale", description="Plans for slices of TPUs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of the tables only: {', '.join(TABLES)}")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    args = parser.parse_args()
    for name in args.names or TABLES:
        made = table(TABLES[name])
        print(made)
        if args.write:
            begin, end = marks(name)
            before, rest = PAGE.read_text().split(begin)
            PAGE.write_text(before + begin + made + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
