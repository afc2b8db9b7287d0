"""The command `plot`: pictures of training runs, and of what is inside a model."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lovely_llama import CONFIGS, LlamaError, check, check_tokens, is_number, is_whole

from .extras import extra
from .figures import COLOURS, INK, check_picture, legible, new_figure, style, write_figure
from .files import checkpoint, load
from .generate import encode_prompt
from .maps import LONGEST, attention_weights, draw_attention
from .options import Arguments, add_command, ids
from .rotary import draw_rope
from .spectra import draw_spectra, spectra
from .strict_json import read_json

PUBLISHED = "llama-3.1-8b"


def add(commands: Any) -> None:
    """Add the command, its pictures and their options."""
    what = "draw the losses of runs, attention maps, rotary frequencies, or the spectra of weights"
    command = add_command(commands, "plot", what, losses)
    pictures = command.add_subparsers(dest="picture", required=True, metavar="PICTURE", parser_class=Arguments)
    made = {
        "losses": ("the training and the validation loss of runs, over each other", losses),
        "attention": ("which tokens of a text each head of a model attends to", attention),
        "rope": ("wavelengths of rotary pairs under each scaling, and the decay of q·k with distance", rotations),
        "spectra": ("the singular values of a model's matrices, layer by layer", weights),
    }
    own = {name: add_command(pictures, name, what, run) for name, (what, run) in made.items()}
    own["losses"].add_argument("runs", metavar="RUN", nargs="+", help="a folder that `train` wrote, or a metrics.jsonl")
    path = "a file, a folder, or a name on Hugging Face's hub"
    for name in ("attention", "spectra"):
        own[name].add_argument("model", metavar="MODEL", help=path)
    own["attention"].add_argument("text", metavar="TEXT", help=f"a text of at most {LONGEST} tokens")
    known = f"{path}, or of a published config (default: {PUBLISHED})"
    own["rope"].add_argument("model", metavar="MODEL", nargs="?", default=PUBLISHED, help=known)
    for name in ("attention", "spectra"):
        own[name].add_argument("--layers", metavar="N,…", help="these layers alone, counted from 0 (default: all)")
    for picture in own.values():
        picture.add_argument("--out", metavar="FILE", required=True, help="a new .png, .svg or .pdf")
        picture.add_argument("--force", action="store_true", help="replace what is there")


def losses(args: argparse.Namespace) -> None:
    """Draw the losses of runs."""
    check_picture(args.out, args.force)
    draw_losses(args.runs, args.out)
    print(args.out)


def attention(args: argparse.Namespace) -> None:
    """Draw the attention maps of a model on a text."""
    check_picture(args.out, args.force)
    model = load(args.model)
    chosen, config = choose_layers(args.layers, model.config.layers), model.config
    limit = min(LONGEST, config.ctx)
    if model.tokenizer is None:
        tokens = ids(args.text, args.model)
        labels = [str(token) for token in tokens]
    else:
        names = {i: name for name, i in model.tokenizer.specials.items()}
        tokens = encode_prompt(model.tokenizer, args.text, limit)
        pieces = [model.tokenizer.pieces[token].decode("utf-8", "backslashreplace") for token in tokens]
        labels = [names.get(token, piece) for token, piece in zip(tokens, pieces, strict=True)]
    tokens = check_tokens(tokens, config.vocab, limit, "text")
    maps = attention_weights(model.params, tokens, config)
    write_figure(draw_attention({i: maps[i] for i in chosen}, labels, args.text), args.out)
    print(args.out)


def rotations(args: argparse.Namespace) -> None:
    """Draw what follows from a config alone."""
    check_picture(args.out, args.force)
    config = CONFIGS.get(args.model)
    if config is None or Path(args.model).exists():
        with checkpoint(args.model) as found:
            config = found.config
    write_figure(draw_rope(config, Path(args.model).resolve().name), args.out)
    print(args.out)


def weights(args: argparse.Namespace) -> None:
    """Draw the spectra of a model's weights."""
    check_picture(args.out, args.force)
    model = load(args.model)
    found = spectra(model.params, choose_layers(args.layers, model.config.layers))
    name = f"Singular values of the matrices of {Path(args.model).resolve().name}"
    write_figure(draw_spectra(*found, model.config, name), args.out)
    print(args.out)


def choose_layers(text: str | None, count: int) -> list[int]:
    """The layers that an option names, or all of them."""
    if text is None:
        return [*range(count)]
    good = re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII)
    layers = sorted({int(digits) for digits in text.split(",")}) if good else []
    valid = bool(layers) and layers[-1] < count
    check("layers", repr(text), valid, f"numbers from 0 to {count - 1}, with commas between")
    return layers


# ---- Losses ----------------------------------------------------------------------------------------------------------


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
            yield number, read_json(line, file)
        except LlamaError as error:
            raise LlamaError(file, f"line {number}: {error.field}", error.got, error.expected) from error
