"""What each checkpoint format carries, found by writing and reading small models: the table of docs/files.md.

    ./dev formats            print it
    ./dev formats --write    put it into docs/files.md

test_docs.py fails if the table there is out of date.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from builders import TINY, random_params, tokenizer_of, write_talker

from lovely_llama import LlamaError, RopeScaling, Sampling
from lovely_llama_tools.formats.files import WRITERS, load, save
from lovely_llama_tools.formats.gguf_header import KINDS as GGUF
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.formats.orbax import KINDS as ORBAX
from lovely_llama_tools.formats.pth import KINDS as TORCH
from lovely_llama_tools.formats.safetensors import KINDS as SAFETENSORS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "files.md"
MARKS = "<!-- formats -->\n", "<!-- /formats -->"

Change = Callable[[Model], Model]


def configured(**fields: Any) -> Change:
    def change(model: Model) -> Model:
        config = replace(model.config, **fields)
        return model._replace(config=config, params=random_params(config))

    return change


def tokenized(**fields: Any) -> Change:
    return lambda model: model._replace(tokenizer=tokenizer_of(model)._replace(**fields))


def kept(field: str) -> Callable[[Model], object]:
    return lambda model: getattr(model.config, field)


# A feature, a model that has it, and where it shows.
FEATURES: dict[str, tuple[Change, Callable[[Model], object]]] = {
    "θ": (configured(theta=5e5), kept("theta")),
    "ε": (configured(eps=1e-6), kept("eps")),
    "linear": (configured(rope_scaling=RopeScaling("linear", 2.0)), kept("rope_scaling")),
    "llama3": (configured(rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)), kept("rope_scaling")),
    "yarn": (configured(rope_scaling=RopeScaling("yarn", 4.0, 32, 1.0, 32.0, 1.25)), kept("rope_scaling")),
    "head_dim": (configured(head_dim=16), kept("head_dim")),
    "untied": (configured(tied=False), kept("tied")),
    "tokenizer": (lambda model: model, lambda model: model.tokenizer and model.tokenizer.encode("the théâtre", False)),
    "template": (lambda model: model, lambda model: model.tokenizer and model.tokenizer.template),
    "stops": (tokenized(stops=frozenset({0, 2, 7})), lambda model: model.tokenizer and model.tokenizer.stops),
    "padding": (
        tokenized(settings={"pad_token": "<|endoftext|>"}),
        lambda model: model.tokenizer and model.tokenizer.pad,
    ),
    "sampling": (tokenized(sampling=Sampling(top_k=5)), lambda model: model.sampling),
}


def carries(to: str, feature: str, model: Model, folder: Path) -> str:
    """Whether a model that has a feature still has it after a save and a load."""
    change, shows = FEATURES[feature]
    given = change(model)
    try:
        save(given, folder / "model", to, force=True)
    except LlamaError:
        return "refused"
    return "yes" if shows(load(folder / "model")) == shows(given) else "no"


def table() -> str:
    """Markdown: how each format is known, what is read and written of it, and what it carries."""
    llama2c = "a .bin of version 0, 1 or 2"
    known = {
        "Hugging Face": ("a folder with config.json", SAFETENSORS, "hf"),
        "GGUF": (
            "a file that begins with GGUF, or any part of a split one",
            [kind.name for kind in GGUF.values()],
            "gguf",
        ),
        "llama2.c": (llama2c, ["F32", "INT8"], "llama2c"),
        "Meta": ("a folder with params.json", TORCH.values(), ""),
        "Orbax": ("a folder with a folder orbax, of a training run", ORBAX.values(), ""),
    }
    rows = ["| format | known by | numbers that are read | `--to` | `--dtype` |", "|---|---|---|---|---|"]
    for name, (by, numbers, prefix) in known.items():
        written = {to: writer for to, writer in WRITERS.items() if prefix and to.startswith(prefix)}
        dtypes = "; ".join(dict.fromkeys(", ".join(writer.dtypes) for writer in written.values()))
        rows.append(f"| {name} | {by} | {', '.join(numbers)} | {', '.join(written) or 'not written'} | {dtypes} |")
    rows += ["", f"| `--to` | {' | '.join(FEATURES)} |", "|---" * (1 + len(FEATURES)) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for to in WRITERS:
            place = Path(folder) / to
            place.mkdir()
            model = Model(TINY, random_params(TINY), load(write_talker(place / "talker.gguf")).tokenizer)
            rows.append(f"| {to} | {' | '.join(carries(to, feature, model, place) for feature in FEATURES)} |")
    return "\n".join(rows) + "\n"


def split(text: str) -> tuple[str, str, str]:
    """A page before, within and after the marks."""
    before, rest = text.split(MARKS[0])
    within, after = rest.split(MARKS[1])
    return before + MARKS[0], within, MARKS[1] + after


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev formats", description="What each checkpoint format carries.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/files.md")
    write, text = parser.parse_args().write, table()
    print(text, end="")
    if write:
        before, _, after = split(PAGE.read_text())
        PAGE.write_text(before + text + after)


if __name__ == "__main__":
    main()
