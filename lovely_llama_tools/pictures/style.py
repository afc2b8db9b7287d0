"""Figures: one style for all pictures, texts that any font can show, and files that are written whole or not at all."""

import functools
import io
from pathlib import Path
from typing import Any

from ..extras import extra
from ..formats.publishing import check_new, write_whole

INK, PALE = "#1a1a1a", "#d9d9d9"  # of texts and axes, and of grids

# Okabe & Ito 2008, "Color Universal Design": told apart by the colour-blind, and on paper by their lightness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

DPI = {".png": 130, ".svg": 72, ".pdf": 72}  # what can be written, by the end of the name


def new_figure(width: float | int, height: float | int) -> Any:
    """An empty figure, in inches, that pyplot knows nothing of: it is drawn by Agg, without a screen."""
    return extra("matplotlib.figure", "plot").Figure((width, height), facecolor="white", layout="constrained")


def style(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Dark text on white, no box, and a pale grid behind."""
    axes.set_facecolor("white")
    axes.set_title(legible(title), loc="left", color=INK, fontsize=10.5)
    axes.set_xlabel(legible(x), color=INK)
    axes.set_ylabel(legible(y), color=INK)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


@functools.cache
def glyphs() -> Any:
    """The characters of the font that figures are set in."""
    manager: Any = extra("matplotlib.font_manager", "plot")
    return manager.get_font(manager.findfont("DejaVu Sans")).get_charmap()


def legible(text: str) -> str:
    """A text as a figure can show it: no mathematics between dollars, and escapes for what the font lacks."""
    known = glyphs()
    shown = (c if c.isprintable() and ord(c) in known else repr(c)[1:-1] for c in text)
    return "".join(c if ord(c[0]) in known else f"U+{ord(c):04X}" for c in shown).replace("$", r"\$")


def check_picture(path: str | Path, force: bool) -> None:
    """Refuse a picture that could not be written, before anything is computed for it."""
    check_new(Path(path), force, DPI)


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a picture, whole or not at all, in place of any that is there."""
    check_picture(path, force=True)
    path, content = Path(path), io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=DPI[path.suffix])
    write_whole(path, lambda part: part.write_bytes(content.getvalue()))
