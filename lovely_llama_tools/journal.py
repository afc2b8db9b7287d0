"""What a training run shows while it goes on: lines, metrics.jsonl, TensorBoard's events, loss.png, samples.txt."""

import json
import math
import re
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from lovely_llama import LlamaError

from .extras import extra
from .plot import draw_losses
from .runs import State

METRICS, SAMPLES, PICTURE = "metrics.jsonl", "samples.txt", "loss.png"
OFTEN, SELDOM = 0.1, 10.0  # seconds between lines: on a terminal, where one replaces another, and elsewhere


class Journal:
    """The open files of a run, and its line on a terminal."""

    def __init__(self, run: Path, metrics: TextIO, samples: TextIO, board: Any, steps: int, owed: Any) -> None:
        self.run, self.metrics, self.samples, self.board, self.steps = run, metrics, samples, board, steps
        self.owed: dict[str, Any] = owed  # the line of a step whose evaluation is owed
        self.live = cast(Any, sys.stderr) is not None and sys.stderr.isatty()
        self.shown, self.noted = time.monotonic() - (0 if self.live else SELDOM), set[str]()

    def line(self, text: str, end: str = "\n") -> None:
        """Print to stderr, over the line that is there on a terminal."""
        print(f"\r\x1b[K{text}" if self.live else text, end=end if self.live else "\n", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a note, once."""
        if text not in self.noted:
            self.noted.add(text)
            self.line(f"note: {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Record a step, and show it if it is time or it was evaluated. What is not finite is null in JSON."""
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.metrics.write(json.dumps(numbers) + "\n")
        self.metrics.flush()
        now, evaluated = time.monotonic(), "val_loss" in row
        if evaluated or now - self.shown > (OFTEN if self.live else SELDOM):
            self.shown = now
            said = f"step {row['step']}/{self.steps}: loss {row['train_loss']:.4f}"
            said += f", validation {row['val_loss']:.4f}" if evaluated else ""
            said += f", rate {row['lr']:.2e}, gradient {row['grad_norm']:.2f}, {row['tokens_per_s']:,.0f} tokens/s"
            self.line(said, "\n" if evaluated else "")
        if self.board:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self.board.add_scalar(name, value, row["step"])

    def sample(self, step: int, text: str) -> None:
        """Record a text of the model's, and show its beginning."""
        self.samples.write(f"---- step {step} ----\n{text}\n\n")
        self.samples.flush()
        self.line(f"sample: {text!r:.100}")

    def draw(self) -> None:
        """Draw the losses so far."""
        try:
            draw_losses([self.run], self.run / PICTURE)
        except LlamaError as error:
            self.note(str(error))
        if self.board:
            self.board.flush()


class Quiet(Journal):
    """That of a process which writes nothing."""

    def __init__(self) -> None:
        self.owed = {}

    def line(self, text: str, end: str = "\n") -> None:
        """Nothing."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def sample(self, step: int, text: str) -> None:
        """Nothing."""

    def draw(self) -> None:
        """Nothing."""


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps beyond this one, which are to come again, and one that was cut short; return them."""
    rows = list[dict[str, Any]]()
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
    part.replace(path)
    return [row for row in rows if row["step"] > step]


def cut_samples(path: Path, step: int) -> None:
    """Drop the texts of steps beyond this one."""
    text = path.read_text() if path.exists() else ""
    for heading in re.finditer(r"^---- step (\d+) ----$", text, re.MULTILINE):
        if int(heading[1]) > step:
            path.write_text(text[: heading.start()])
            return


@contextmanager
def journal(run: Path, state: State, steps: int) -> Generator[Journal]:
    """The journal of a run from this state on."""
    dropped = cut_metrics(run / METRICS, state.step - state.owed)
    owed = next((row for row in dropped if row["step"] == state.step), {"step": state.step})
    cut_samples(run / SAMPLES, state.step)
    missing, board = "", None
    try:
        board = extra("tensorboardX", "train").SummaryWriter(str(run), purge_step=state.step + 1)
    except LlamaError as error:
        missing = str(error)
    with open(run / METRICS, "a") as metrics, open(run / SAMPLES, "a") as samples:
        book = Journal(run, metrics, samples, board, steps, owed)
        if missing:
            book.note(f"no TensorBoard events: {missing}")
        try:
            yield book
        finally:
            if board:
                board.close()
