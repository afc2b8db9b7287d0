"""The command `plot`: pictures of training runs, and of what is inside a model."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from lovely_llama import CONFIGS, check, check_tokens

from ..comparing.trace import trace
from ..formats.files import checkpoint, load
from ..inference.generate import encode_prompt
from ..pictures.attention import LONGEST, draw_attention
from ..pictures.losses import draw_losses
from ..pictures.rotary import draw_rope
from ..pictures.style import check_picture, write_figure
from ..pictures.weights import draw_spectra, spectra
from .options import MODEL, READ, READING, add_command, add_subcommands, ids, reading

PUBLISHED = "llama-3.1-8b"


LAYERS = {"--layers": dict(metavar="N,…", help="draw these layers only, counted from 0 (default: all)")}
WEIGHTS = {"model": dict(metavar="MODEL", help=MODEL), **READ}
OUTPUT = {
    "--out": dict(metavar="FILE", required=True, help="the new picture: .png, .svg or .pdf"),
    "--force": dict(action="store_true", help="replace FILE if it exists"),
}
EXAMPLES = {
    "losses": """
lovely-llama plot losses run --out losses.png
lovely-llama plot losses run/metrics.jsonl --out losses.svg
""",
    "attention": """
lovely-llama plot attention run/best "To be, or not to be" --out maps.png
lovely-llama plot attention run/best "To be, or not to be" --layers 0 --out maps.svg
""",
    "rope": """
lovely-llama plot rope --out rope.png
lovely-llama plot rope run/best --out own.png
""",
    "spectra": """
lovely-llama plot spectra run/best --out spectra.png
lovely-llama plot spectra run/best --layers 0 --out first.pdf
""",
}


def add(commands: Any) -> None:
    """Add the command and its pictures."""
    drawn = {"plot": "every picture"}
    what = "draw training curves, attention maps and more"
    command = add_command(
        commands, "plot", what, None, {}, about="Draw pictures of training runs, and of what is inside a model.",
        examples="\n".join(EXAMPLES[name].splitlines()[1] for name in ("losses", "attention", "rope")), extras=drawn,
    )  # fmt: skip
    runs = dict(metavar="RUN", nargs="+", help="a folder that `train` wrote, or its metrics.jsonl")
    text = dict(metavar="TEXT", help=f"the text, at most {LONGEST} tokens")
    config = dict(metavar="MODEL", nargs="?", default=PUBLISHED,
                  help=f"a published config; or {MODEL} (default: {PUBLISHED})")  # fmt: skip
    pictures = add_subcommands(command, "picture")
    for name, what, run, options, extras in (
        ("losses", "draw training and validation losses of one or more runs", losses, {"runs": {"runs": runs}}, drawn),
        ("attention", "draw which tokens of a text each head attends to", attention,
         {"model": {**WEIGHTS, **LAYERS}, "text": {"text": text}}, drawn | READING),
        ("rope", "draw the wavelengths of rotary pairs, and the decay of q·k with distance", rotations,
         {"model": {"model": config, **READ}}, drawn | READING),
        ("spectra", "draw the singular values of a model's matrices", weights,
         {"model": {**WEIGHTS, **LAYERS}}, drawn | READING),
    ):  # fmt: skip
        add_command(pictures, name, what, run, {**options, "output": OUTPUT}, examples=EXAMPLES[name], extras=extras)


def losses(args: argparse.Namespace) -> None:
    """Draw the losses of runs."""
    check_picture(args.out, args.force)
    draw_losses(args.runs, args.out)
    print(args.out)


def attention(args: argparse.Namespace) -> None:
    """Draw the attention maps of a model on a text."""
    check_picture(args.out, args.force)
    model = load(args.model, **reading(args))
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
    weights = trace(model, tokens, [f"layers.{i}.weights" for i in chosen])
    maps = {i: np.asarray(weights[f"layers.{i}.weights"], np.float32) for i in chosen}
    write_figure(draw_attention(maps, labels, args.text), args.out)
    print(args.out)


def rotations(args: argparse.Namespace) -> None:
    """Draw the rotary frequencies of a config."""
    check_picture(args.out, args.force)
    config = CONFIGS.get(args.model)
    if config is None or Path(args.model).exists():
        with checkpoint(args.model, **reading(args)) as found:
            config = found.config
    write_figure(draw_rope(config, Path(args.model).resolve().name), args.out)
    print(args.out)


def weights(args: argparse.Namespace) -> None:
    """Draw the spectra of a model's weights."""
    check_picture(args.out, args.force)
    model = load(args.model, **reading(args))
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
