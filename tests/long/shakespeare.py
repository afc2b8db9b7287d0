"""TinyShakespeare: a run of `lovely-llama train` with the settings of docs/training.md, and what came of it.

./dev shakespeare TEXT RUN            train on TEXT, unless the folder RUN is there, and print the losses
./dev shakespeare TEXT RUN --write    and put them into docs/training.md, with docs/shakespeare.png
"""

import argparse
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

from lovely_llama_tools.commands import main as lovely_llama
from lovely_llama_tools.plot import draw_losses

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE, MARKS = (
    DOCS / "training.md",
    DOCS / "shakespeare.png",
    ("<!-- shakespeare -->\n", "<!-- /shakespeare -->"),
)
FLAGS = """--tokenizer chars --layers 4 --heads 8 --dim 128 --hidden-dim 344 --ctx 64 --batch 12 --steps 2000 --lr 6e-3
    --final-lr 0 --warmup 200 --weight-decay 0.3 --beta2 0.98 --theta 100 --init-std 0.05 --eval-every 500
    --eval-batches 1000"""


def report(run: Path) -> str:
    """The command, the losses of its evaluations, and its last sample, in Markdown."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    command = textwrap.wrap(" ".join(f"lovely-llama train tinyshakespeare.txt {FLAGS}".split()), 110)
    lines = ["```text", " \\\n    ".join(command), "```", "", "| step | training | validation |", "|---|---|---|"]
    for i, row in enumerate(rows):
        if "val_loss" in row:
            recent = [other["train_loss"] for other in rows[max(i - 99, 0) : i + 1]]
            lines.append(f"| {row['step']} | {sum(recent) / len(recent):.3f} | {row['val_loss']:.4f} |")
    sample = re.split(r"---- step \d+ ----\n", (run / "samples.txt").read_text())[-1].strip()
    lines += ["", "Training losses are means of the last 100 steps. What it writes in the end:", "", "```text", sample]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev shakespeare", description="Train on TinyShakespeare.")
    parser.add_argument("text", metavar="TEXT", help="tinyshakespeare.txt")
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run")
    parser.add_argument("--write", action="store_true", help="put the losses into docs/training.md")
    args = parser.parse_args()
    if not args.run.exists() and (
        status := lovely_llama(["train", args.text, "--out", str(args.run), *shlex.split(FLAGS)])
    ):
        sys.exit(status)
    text = report(args.run)
    print(text, end="")
    if args.write:
        draw_losses([args.run], PICTURE)
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
