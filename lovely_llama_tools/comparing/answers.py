"""What every known bug gives on a model of the probe, computed beforehand: a verdict then takes a second."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from lovely_llama import LlamaError, check

from ..extras import progress
from ..formats.files import load
from ..formats.model import Model, open_file
from ..formats.safetensors import KINDS, WHOLE, read_tensor, scan_safetensors
from .bugs import BUGS
from .candidates import SAME, Candidates, Distance, bos_of

ANSWERS = "answers.safetensors"
OFFSETS = np.array([*range(-272, -258), -252, -240, -200, -140, -60, -16, -13, -9, -5, -3, -2, -1], np.int32)
FIELDS = ("tokens", "columns", "offsets", "right", "roundings", "noises")  # of the file; all others are bugs
COLUMNS = 24  # of the vocabulary; with these positions enough to tell the bugs, and small enough to keep


class Answers(Candidates):
    """The candidates of a probe's model on its prompt, at some positions and columns."""

    def __init__(self, model: Model, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        super().__init__(model.params, model.config, arrays["tokens"], "float32", bos_of(model))
        self.model, self.columns, self.offsets = model, arrays["columns"], arrays["offsets"]
        self.right, self.roundings = arrays["right"].astype(np.float64), arrays["roundings"].tolist()
        bugs = [name for name in arrays if name not in FIELDS]  # of another version's catalogue, perhaps
        self.known = {name: arrays[name].astype(np.float64) for name in bugs}
        self.noises = {name: Distance(*pair) for name, pair in zip(bugs, arrays["noises"].tolist(), strict=True)}


def computed(model: Model, ids: Int[np.ndarray, " seq"]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """What `Answers` reads: the rows of each bug by its name, how far each is from its own with other roundings, the
    right rows at all positions, and their roundings."""
    whole = Candidates(model.params, model.config, ids, "float32", bos_of(model))
    whole.columns = np.linspace(0, model.config.vocab - 1, COLUMNS).astype(np.int32)
    roundings, right = np.array(whole.roundings, np.float32), whole.right.astype(np.float32)
    some = Candidates(model.params, model.config, ids, "float32", bos_of(model))
    some.columns, some.offsets = whole.columns, OFFSETS
    some.of(SAME)
    with progress("answers", len(BUGS), " bugs") as tell:
        some.all(tell)
    noises = np.array([some.noise(BUGS.get(name, SAME)) for name in sorted(some.known)], np.float32)
    arrays: dict[str, Any] = {"tokens": ids, "columns": some.columns, "offsets": some.offsets, "right": right}
    arrays |= {"roundings": roundings, "noises": noises}
    return arrays | {name: some.known[name].astype(np.float32) for name in sorted(some.known)}


def opened(path: Path, tokens: Sequence[int] | Any | None) -> Model | Answers:
    """A model. In a folder that `golden` made it is the one whose prompt these tokens are, with the answers; in that of
    one of its models this one, with the answers if the prompt is its own, or none is given."""
    whole = (path / "manifest.json").is_file()
    places = sorted(path.glob(f"*/{ANSWERS}")) if whole else [place] if (place := path / ANSWERS).is_file() else []
    for place in places:
        with open_file(place) as file:
            found = scan_safetensors(file, place, KINDS | WHOLE)
            missing = [name for name in FIELDS if name not in found]
            check("tensors", f"no {', '.join(missing)}", not missing, "those that golden writes", place)
            prompt = read_tensor(file, place, "tokens", found["tokens"])
            if (tokens is None and not whole) or np.array_equal(prompt, np.asarray(tokens)):
                arrays = {name: read_tensor(file, place, name, found[name]) for name in found}
                return Answers(load(place.parent / "model"), arrays)
    if len(places) > 1:
        names = ", ".join(place.parent.name for place in places)
        raise LlamaError(path, "tokens", "no model's prompt", f"that of {names}, or a folder with one of them")
    return load(path / "model" if places else path)
