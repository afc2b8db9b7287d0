"""Logging of a training run: progress lines, metrics.jsonl, TensorBoard events, loss.png, samples.jsonl."""

import json
import math
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from lovely_llama import LlamaError

from ..extras import extra
from ..pictures.losses import draw_losses
from ..strict_json import nulled, to_json
from .run_folder import METRICS, PICTURE, SAMPLES, Progress

TERMINAL, ELSEWHERE = 0.1, 10.0  # least seconds between progress lines; on a terminal each replaces the last


class MetricsLogger:
    """Writes metrics and sample texts to a run's folder, and progress to stderr."""

    def __init__(self, run: Path, metrics: TextIO, samples: TextIO, board: Any, steps: int, pending: Any) -> None:
        self.run, self.metrics, self.samples, self.board, self.steps = run, metrics, samples, board, steps
        self.pending: dict[str, Any] = pending  # metrics of a step whose evaluation was interrupted
        self.live = cast(Any, sys.stderr) is not None and sys.stderr.isatty()
        self.shown, self.noted = time.monotonic() - (0 if self.live else ELSEWHERE), set[str]()

    def line(self, text: str, end: str = "\n") -> None:
        """Print to stderr, on a terminal over the current line."""
        print(f"\r\x1b[K{text}" if self.live else text, end=end if self.live else "\n", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a note, once."""
        if text not in self.noted:
            self.noted.add(text)
            self.line(f"note: {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Record a step's metrics; print them after an evaluation, or if it is time. NaN and ∞ become null in JSON."""
        self.metrics.write(to_json(nulled(row)) + "\n")
        self.metrics.flush()
        now, evaluated = time.monotonic(), "val_loss" in row
        if evaluated or now - self.shown > (TERMINAL if self.live else ELSEWHERE):
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
        """Record a sample text, and print its beginning."""
        self.samples.write(to_json({"step": step, "text": text}) + "\n")
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


class SilentLogger(MetricsLogger):
    """For processes other than the first, which log nothing."""

    def __init__(self) -> None:
        self.pending = {}

    def line(self, text: str, end: str = "\n") -> None:
        """Nothing."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def sample(self, step: int, text: str) -> None:
        """Nothing."""

    def draw(self) -> None:
        """Nothing."""


def cut_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of later steps, which will be repeated, and an incomplete last line; return the former."""
    rows = list[dict[str, Any]]()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(to_json(row) + "\n" for row in rows if row["step"] <= step))
    part.replace(path)
    return [row for row in rows if row["step"] > step]


@contextmanager
def metrics_logger(run: Path, progress: Progress, steps: int) -> Generator[MetricsLogger]:
    """The logger of a run that continues from `progress`."""
    dropped = cut_rows(run / METRICS, progress.step - progress.owed)
    pending = next((row for row in dropped if row["step"] == progress.step), {"step": progress.step})
    cut_rows(run / SAMPLES, progress.step)
    missing, board = "", None
    try:
        board = extra("tensorboardX", "train").SummaryWriter(str(run), purge_step=progress.step + 1)
    except LlamaError as error:
        missing = str(error)
    with open(run / METRICS, "a") as metrics, open(run / SAMPLES, "a") as samples:
        logger = MetricsLogger(run, metrics, samples, board, steps, pending)
        if missing:
            logger.note(f"no TensorBoard events: {missing}")
        try:
            yield logger
        finally:
            if board:
                board.close()
