"""Meta's folders: params.json and consolidated.NN.pth, of each tensor the part that one of its devices held."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lovely_llama import CONFIGS, Config, RopeScaling, check, check_tensors, is_number, is_whole

from ..tokens import folder_tokenizer
from .hugging_face_config import UNKNOWN, read_fields
from .layout import LLAMA2C, NAMES, all_tensors
from .model import Checkpoint, Tensor, blamed_on
from .pth import Part

PARAMS = "params.json"
# The fields of params.json: which kind of value each has, and what Meta's code assumes where it is not stated.
FIELDS: dict[str, tuple[type, Any]] = {
    "dim": (int, ...),
    "n_layers": (int, ...),
    "n_heads": (int, ...),
    "n_kv_heads": (int, None),
    "vocab_size": (int, -1),
    "multiple_of": (int, 256),
    "ffn_dim_multiplier": (float, None),
    "norm_eps": (float, 1e-5),
    "rope_theta": (float, 1e4),
    "use_scaled_rope": (bool, False),
    "rope_scaling_factor": (float, None),
    "max_seq_len": (int, None),
}
IGNORED = {"max_batch_size"}
CTX = {1e4: 4096, 5e5: 8192, 1e6: 16384}  # by theta: Llama 2, Llama 3 and Code Llama
BUFFERS = {"rope.freqs"}  # a table of frequencies, not read
EMBED, UNEMBED = (f"{NAMES[field][LLAMA2C.column]}.weight" for field in ("embed", "unembed"))
# The axis along which the parts of a tensor are joined. All parts have the same norms.
AXES = {
    f"{NAMES[field][LLAMA2C.column]}.weight": axis
    for axis, fields in enumerate((("q", "k", "v", "gate", "up", "unembed"), ("o", "down")))
    for field in fields
}
Get = Callable[[str], Float[np.ndarray, "..."]]


def open_meta(path: Path, _: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A folder as Meta distributes it, with Llama 1, 2 or 3. torch opens its files, and none stays open."""
    params, file = read_fields(path / PARAMS, path), path / PARAMS
    given = read_params(params, file, allow)
    parts = open_parts(path)
    tensors, get = join(parts, given["dim"])
    shapes, layers = {name: tensor.shape for name, tensor in tensors.items()}, given["n_layers"]
    check("n_layers", layers, layers <= len(shapes), f"at most {len(shapes)}, the number of tensors", file)
    vocab = shapes.get(EMBED, (0,))[0]
    config = make_config(given, vocab, UNEMBED not in shapes, file)
    check_tensors(all_tensors(LLAMA2C, config), shapes, path)
    if not config.tied and is_tied(parts[0], get):
        config = make_config(given, vocab, True, file)
        del tensors[UNEMBED]
    used: dict[str, Any] = {"n_kv_heads": config.kv_heads, "vocab_size": config.vocab, "max_seq_len": config.ctx}
    if config.rope_scaling:
        used["rope_scaling_factor"] = config.rope_scaling.factor
    fields = {name: (value, "ignored") for name, value in params.items()}
    for name, value in (given | used).items():
        fields[name] = value, "defaulted" if params.get(name) is None else "honoured"
    return Checkpoint(path, "Meta", LLAMA2C, config, fields, tensors, get, folder_tokenizer(path, config.vocab))


# ---- params.json -----------------------------------------------------------------------------------------------------


def read_params(params: Mapping[str, Any], file: Path, allow: Collection[str] = ()) -> dict[str, Any]:
    """The fields of params.json, each of its kind, or as Meta's code assumes it."""
    must, given = partial(check, file=file), dict[str, Any]()
    for name, value in params.items():
        known = name in FIELDS or name in IGNORED or name in allow
        must(name, f"{value!r:.60}", known, UNKNOWN.format(name))
    for name, (kind, default) in FIELDS.items():
        value = params.get(name)
        if value is None:
            must(name, "nothing", default is not ..., "a value")
            given[name] = default
            continue
        good = isinstance(value, bool) if kind is bool else is_whole(value) if kind is int else is_number(value)
        must(name, f"{value!r:.60}", good, {int: "a whole number", float: "a number", bool: "true or false"}[kind])
        positive = kind is bool or 0 < value < 2**31 or (name, value) == ("vocab_size", -1)
        must(name, f"{value!r:.60}", positive, "a number above 0 and below 2147483648")
        given[name] = value
    heads, kv_heads = given["n_heads"], given["n_kv_heads"] or given["n_heads"]
    must("n_heads", heads, given["dim"] % heads == 0, f"a divisor of dim, {given['dim']}")
    must("n_kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of n_heads, {heads}")
    factor = given["rope_scaling_factor"]
    must("rope_scaling_factor", factor, factor is None or given["use_scaled_rope"], "none, without use_scaled_rope")
    return given


def make_config(given: Mapping[str, Any], vocab: int, tied: bool, file: Path) -> Config:
    """The config that the fields describe. The embedding has `vocab` rows, if they leave that open with −1.

    hidden_dim is ⅔ · 4 dim, times a factor, up to the next multiple of a number. The context that a model was trained
    for is not said: it is taken from published models, or else from theta.
    """
    dim, heads, multiple, scaling = given["dim"], given["n_heads"], given["multiple_of"], None
    hidden_dim = int((given["ffn_dim_multiplier"] or 1) * int(2 * 4 * dim / 3))
    hidden_dim = multiple * math.ceil(hidden_dim / multiple)
    kv_heads, theta = given["n_kv_heads"] or heads, given["rope_theta"]
    if given["use_scaled_rope"]:
        factor = given["rope_scaling_factor"] or scaling_factor(dim, given["n_layers"])
        scaling = RopeScaling("llama3", factor, 8192, low=1.0, high=4.0)
    with blamed_on(file):
        config = Config(
            vocab if given["vocab_size"] == -1 else given["vocab_size"], dim, given["n_layers"], kv_heads,
            heads // kv_heads, dim // heads, hidden_dim, 2048, given["norm_eps"], theta, scaling, tied,
        )  # fmt: skip
    ctx = 131072 if scaling else CTX.get(theta, 2048)
    ctx = next((known.ctx for known in CONFIGS.values() if replace(known, ctx=2048) == config), ctx)
    return replace(config, ctx=given["max_seq_len"] or ctx)


def scaling_factor(dim: int, layers: int) -> float:
    """8, but 32 in Llama 3.2, whose params.json does not tell."""
    scalings = (c.rope_scaling for c in CONFIGS.values() if (c.dim, c.layers) == (dim, layers))
    return next((scaling.factor for scaling in scalings if scaling), 8.0)


# ---- Parts -----------------------------------------------------------------------------------------------------------


def open_parts(path: Path) -> list[Part]:
    """The files consolidated.00.pth and so on, which must hold the same names, shapes and dtypes."""
    names = sorted(part.name for part in path.glob("consolidated.*"))
    numbered = [f"consolidated.{i:02}.pth" for i in range(max(len(names), 1))]
    check("path", ", ".join(names)[:99] or "no parts", names == numbered, ", ".join(numbered)[:99], path)
    parts = [Part(path / name) for name in names]
    first = parts[0].tensors
    for part in parts[1:]:
        wanted, found = ({name: tensor.shape for name, tensor in some.items()} for some in (first, part.tensors))
        check_tensors(wanted, found, part.path)
        for name, tensor in part.tensors.items():
            check(
                name, tensor.dtype, tensor.dtype == first[name].dtype, f"{first[name].dtype} as in part 00", part.path
            )
    return parts


def join(parts: list[Part], dim: int) -> tuple[dict[str, Tensor], Get]:
    """The tensors that the parts make up, and what reads one of them."""
    first = {name: tensor for name, tensor in parts[0].tensors.items() if name not in BUFFERS}

    def axis_of(name: str) -> int | None:
        """Up to Llama 2 the embedding is split by dim, since Llama 3 by vocab."""
        if name == EMBED:
            return int(first[name].shape[-1:] != (dim,))
        return AXES.get(re.sub(r"\.\d+\.", ".{}.", name))

    def joined(name: str, tensor: Tensor) -> Tensor:
        sizes = enumerate(tensor.shape)
        return tensor._replace(shape=tuple(n * len(parts) if i == axis_of(name) else n for i, n in sizes))

    def get(name: str) -> Float[np.ndarray, "..."]:
        arrays, axis = [part.get(name) for part in parts], axis_of(name)
        if axis is not None:
            return np.concatenate(arrays, axis)
        for part, array in zip(parts, arrays, strict=True):
            check(name, "other values", np.array_equal(array, arrays[0]), "the same in all parts", part.path)
        return arrays[0].copy()

    return {name: joined(name, tensor) for name, tensor in first.items()}, get


def is_tied(part: Part, get: Get) -> bool:
    """Whether the unembedding is the embedding once more, as Meta writes Llama 3.2. Mostly the first row tells."""
    row, other = part.get(EMBED)[0], part.get(UNEMBED)[0]
    return np.array_equal(row, other[: len(row)]) and np.array_equal(get(EMBED), get(UNEMBED))
