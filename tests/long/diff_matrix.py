"""`diff` on two programs that are not ours, with known bugs, unlisted faults and none: the matrix of docs/diff.md.

    ./dev diff-matrix            print it, and every verdict that does not name the bug alone
    ./dev diff-matrix --write    put it into docs/diff.md
    ./dev diff-matrix MODEL ...  only some models: grouped, square, small, smollm2; with --write their rows alone

Each program computes logits alone: on the prompt of a probe's model in float32, else on forty ids. test_diff.py is its
short form.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import SMALL, random_params
from foreign import TORCH, TRANSFORMERS, UNLISTED, in_torch, in_transformers, oracle_with
from numerics import split

from lovely_llama_tools import default_model, diff, load
from lovely_llama_tools.comparing.answers import opened
from lovely_llama_tools.comparing.bugs import BUGS
from lovely_llama_tools.comparing.candidates import SAME, Candidates, candidates_of, distance
from lovely_llama_tools.comparing.diff import default_prompt
from lovely_llama_tools.comparing.golden import golden
from lovely_llama_tools.comparing.judging import NEAR
from lovely_llama_tools.formats.model import Model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diff.md"
MARKS = "<!-- matrix -->\n", "<!-- /matrix -->"
MODELS = ("grouped", "square", "small", "smollm2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("named", "with one other", "with more", "taken for rounding", "without a name", "wrong")


def cached(model: Model, dtype: Any) -> Callable[[Any], Any]:
    """transformers' Llama without a bug, token by token with its cache."""
    net = oracle_with(None, model.params, model.config)[0].to(dtype)

    @torch.no_grad()
    def run(ids: Any) -> Any:
        rows, cache = list[Any](), None
        for token in ids:
            out = net(torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
        return torch.cat(rows)

    return run


def shows(name: str, candidates: Candidates) -> bool:
    """Whether a bug does more to these logits than rounding, and leaves numbers."""
    bug = BUGS[name]
    if bug.fits and not bug.fits(candidates.config):
        return False
    effect = distance(candidates.of(bug), candidates.of(SAME)).whole
    return NEAR * candidates.noise(SAME).whole < effect < np.inf


def outcome(name: str, verdict: Any) -> str:
    """What a verdict is worth."""
    if verdict.verdict == "same":
        return "taken for rounding"
    if name in verdict.bugs:
        return COLUMNS[min(len(verdict.bugs), 3) - 1]
    return "wrong" if verdict.bugs or verdict.dial else "without a name"


def rows_of(which: str, folder: Path) -> list[str]:
    """The rows of one model."""
    of_probe = which in ("grouped", "square")
    path: Any = folder / which if of_probe else default_model()
    model = Model(SMALL, random_params(SMALL), None) if which == "small" else load(path / "model" if of_probe else path)
    lines = list[str]()
    for dtype in DTYPES if which != "smollm2" else ("float32",):
        kind, known = DTYPES[dtype], of_probe and dtype == "float32"
        ids = default_prompt(model.config)
        found: Any = opened(path, None) if known else candidates_of(model, ids, dtype)

        def judge(run: Callable[[Any], Any], known: bool = known, ids: Any = ids, dtype: str = dtype) -> Any:
            return diff(path, run) if known else diff(model, run(ids), ids, dtype=dtype)

        for program, names in (("transformers", TRANSFORMERS), ("torch", TORCH)):

            def made(name: str | None, program: str = program, kind: Any = kind) -> Any:
                if program == "transformers":
                    return in_transformers(model, name, kind)
                return nullcontext(in_torch(model, name, kind))

            start, counts = time.monotonic(), Counter[str]()
            shown = [name for name in names if shows(name, found)]
            for name in shown:
                with made(name) as run:
                    verdict = judge(run)
                counts[outcome(name, verdict)] += 1
                if verdict.bugs != [name]:
                    print(f"{which}, {dtype}, {program}: {name}: {verdict.verdict} {verdict.bugs} {verdict.dial or ''}")
            with made(None) as run:
                right = [judge(run), *([judge(cached(model, kind))] if program == "transformers" else [])]
            same = sum(verdict.verdict == "same" for verdict in right)
            unlisted = list[Any]()
            for name in UNLISTED if program == "transformers" else ():
                with made(name) as run:
                    verdict = judge(run)
                unlisted += [name] * (verdict.verdict in ("bug", "several"))
            print(f"{which}, {dtype}, {program}: {time.monotonic() - start:.0f} s; unlisted but named: {unlisted}")
            cells = [
                which,
                dtype,
                program,
                len(shown),
                *(counts[column] for column in COLUMNS),
                f"{same} of {len(right)}",
            ]
            cells.append(f"{len(unlisted)} of {len(UNLISTED)}" if program == "transformers" else "")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser("./dev diff-matrix", description="diff on programs that are not ours.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/diff.md")
    arguments = parser.parse_args()
    chosen = arguments.models or MODELS
    if unknown := set(chosen) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}")
    lines = list[str]()
    with tempfile.TemporaryDirectory() as folder:
        golden(Path(folder) / "probe") if {"grouped", "square"} & {*chosen} else None
        for which in chosen:
            lines += rows_of(which, Path(folder) / "probe")
    print(table([], lines))
    if arguments.write:
        before, written, after = split(PAGE.read_text(), MARKS)
        PAGE.write_text(before + table(written.splitlines()[2:], lines) + after)


def table(old: list[str], new: list[str]) -> str:
    """Rows under their head; those of a model take the place of older ones."""

    def model(line: str) -> str:
        return line.split(" | ")[0].removeprefix("| ")

    renewed = {*map(model, new)}
    lines = sorted([*(line for line in old if model(line) not in renewed), *new], key=lambda x: MODELS.index(model(x)))
    head = ("model", "dtype", "program", "bugs", *COLUMNS, "correct called so", "unlisted named")
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines, ""])


if __name__ == "__main__":
    main()
