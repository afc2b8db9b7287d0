"""The picture of training runs: their training and validation losses, out of each one's metrics.jsonl."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lovely_llama import LlamaError, check, is_number, is_whole

from ..extras import extra
from ..strict_json import read_json
from .style import COLOURS, INK, legible, new_figure, style, write_figure

TICKS = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 7)  # of a logarithmic axis, times powers of ten


class Curve(NamedTuple):
    """A loss over steps."""

    steps: Int[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]

    def smoothed(self) -> Float[np.ndarray, " n"]:
        """The mean over a window of a fiftieth of all points: narrower at the beginning, where losses fall fast."""
        at, half = np.arange(len(self.losses)), len(self.losses) // 100
        before = np.minimum(half, at)
        after = np.minimum(before, at[::-1])
        sums = np.concatenate([[0.0], np.cumsum(self.losses)])
        return (sums[at + after + 1] - sums[at - before]) / (after + before + 1)


def draw_losses(runs: Sequence[str | Path], path: str | Path) -> None:
    """Draw the training and the validation loss of one or several runs into one picture, in place of any there."""
    folders = [Path(run).parent if Path(run).is_file() else Path(run) for run in runs]
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [str(run) for run in runs]
    curves = [read_losses(Path(run)) for run in runs]
    figure, ticker = new_figure(8, 4.5), extra("matplotlib.ticker", "plot")
    axes = figure.add_subplot()
    style(axes, names[0] if len(runs) == 1 else "", "step", "loss (nats per token)")
    shown: dict[str, Any] = {}
    for i, (name, (train, validation)) in enumerate(zip(names, curves, strict=True)):
        colour, prefix = COLOURS[i % len(COLOURS)], "" if len(runs) == 1 else f"{name}: "
        if len(train.steps):
            axes.plot(*train, color=colour, linewidth=0.6, alpha=0.25)
            (line,) = axes.plot(train.steps, train.smoothed(), color=colour, linewidth=1.2)
            shown[legible(f"{prefix}training")] = line
        if len(validation.steps):
            best = int(validation.losses.argmin())
            least = f"least {validation.losses[best]:.4g} at step {validation.steps[best]:,}"
            colour = COLOURS[(i + 1) % len(COLOURS)] if len(runs) == 1 else colour
            (line,) = axes.plot(*validation, "o-", color=colour, linewidth=2, markersize=4)
            shown[legible(f"{prefix}validation, {least}")] = line
    every = np.concatenate([curve.losses for both in curves for curve in both])
    if every.max() > 2 * every.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=TICKS))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend([*shown.values()], [*shown], frameon=False, labelcolor=INK, fontsize=9)
    write_figure(figure, path)


def read_losses(run: Path) -> tuple[Curve, Curve]:
    """The training and the validation loss out of a run's metrics.jsonl. Where a step occurs twice the later counts."""
    file = run / "metrics.jsonl" if run.is_dir() else run
    curves: list[dict[int, float]] = [{}, {}]
    for line, metrics in read_metrics(file):
        step: Any = metrics.get("step")
        check(f"line {line}: step", repr(step), is_whole(step) and step >= 0, "a whole number from 0", file)
        for curve, field in zip(curves, ("train_loss", "val_loss"), strict=True):
            loss: Any = metrics.get(field)
            if loss is None:  # not evaluated, or not finite
                continue
            check(f"line {line}: {field}", repr(loss), is_number(loss) and loss > 0, "a number above 0", file)
            curve[step] = float(loss)
    check("losses", "none", any(curves), "a line with train_loss or val_loss", file)
    made = [sorted(curve.items()) for curve in curves]
    first, second = (Curve(np.array([s for s, _ in c], int), np.array([x for _, x in c], float)) for c in made)
    return first, second


def read_metrics(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file that has one on each line, with their numbers. A last line may still be in writing."""
    try:
        check("path", "no regular file", file.is_file(), "a run's folder, or its metrics.jsonl", file)
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise LlamaError(file, "path", error.strerror, "a file that can be read") from error
    if not lines[-1].endswith(b"}"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            yield number, read_json(line, file, lines=True)
        except LlamaError as error:
            raise LlamaError(file, f"line {number}: {error.field}", error.got, error.expected) from error
