"""llama2.c: the names of its model.py, and its checkpoints, versions 0, 1 and 2, with a tokenizer beside them."""

import importlib.util
import math
import os
import struct
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from lovely_llama import Config, LlamaError, Params, check

from ..extras import counted
from ..tokens import (
    Tokenizer,
    bin_tokenizer,
    folder_tokenizer,
    tokenizer_bin,
    tokenizer_files,
    usual_stops,
)
from .layout import LLAMA2C, NAMES, all_tensors, from_arrays, to_arrays, to_named
from .model import Checkpoint, Model, Tensor, blamed_on, narrowed, open_file, read_at

MAGIC = b"24ka"  # of versions 1 and 2; version 0 has none
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
EPS, THETA = 1e-5, 1e4  # run.c fixes both

# The order of a file after its header: each parameter for all layers in turn. Version 0 has tables of cosines and
# sines, which run.c does not read any more.
TABLES = ("freqs_cos", "freqs_sin")
ORDERS = {
    0: (*list(NAMES)[:-1], *TABLES, "unembed"),
    1: ("attn_norm", "ffn_norm", "norm", "embed", "q", "k", "v", "o", "gate", "down", "up", "unembed"),
}
ORDERS[2] = ORDERS[1]


def from_llama2c(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in llama2.c's model.py: each a pure reshape, and a copy."""
    return from_arrays(LLAMA2C, arrays, config)


def to_llama2c(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in llama2.c's model.py."""
    return to_arrays(LLAMA2C, params, config)


class Header(NamedTuple):
    """What stands before the parameters: seven sizes, and since version 1 a magic number, a version and flags.

    github.com/karpathy/llama2.c, export.py.
    """

    version: int
    sizes: dict[str, int]  # vocab_size is positive
    tied: bool
    group: int = 0  # in version 2: how many int8 share a scale

    @property
    def length(self) -> int:
        return 256 if self.version else 28

    def pack(self) -> bytes:
        sizes = list(self.sizes.values())
        if self.version == 0:
            sizes[SIZES.index("vocab_size")] *= 1 if self.tied else -1
            return struct.pack("<7i", *sizes)
        head = MAGIC + struct.pack("<8iB", self.version, *sizes, self.tied)
        return (head + struct.pack("<i", self.group) * (self.version == 2)).ljust(256, b"\0")

    @classmethod
    def read(cls, file: BinaryIO, path: Path) -> "Header":
        must, data = partial(check, file=path), file.read(256)
        start = 8 if data[:4] == MAGIC else 0
        least = 256 if start else 28
        must("size", counted(len(data), "byte"), len(data) >= least, f"at least {least}")
        sizes = dict[str, int](zip(SIZES, struct.unpack_from("<7i", data, start), strict=True))
        version, tied, group = 0, sizes["vocab_size"] > 0, 0
        if start:
            (version,) = struct.unpack_from("<i", data, 4)
            must("version", version, version in (1, 2), "1 or 2")
            must("shared_classifier", data[36], data[36] in (0, 1), "0 or 1")
            tied, rest = data[36] == 1, data[37:]
            if version == 2:
                (group,), rest = struct.unpack_from("<i", rest), rest[4:]
            must("padding", "other bytes", not any(rest), "zeros to the end of the header")
        else:
            sizes["vocab_size"] = abs(sizes["vocab_size"])
        for field, value in sizes.items():
            must(field, value, 1 <= value < 2**31, "a whole number above 0 (is this a llama2.c file?)")
        dim, heads, kv_heads = sizes["dim"], sizes["n_heads"], sizes["n_kv_heads"]
        must("n_heads", heads, dim % heads == 0, f"a divisor of dim, {dim}")
        must("n_kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of n_heads, {heads}")
        if version == 2:
            must("group_size", group, group > 0 and dim % group == 0, f"a divisor of dim, {dim}")
        return cls(version, sizes, tied, group)

    def config(self) -> Config:
        dim, hidden_dim, layers, heads, kv_heads, vocab, ctx = self.sizes.values()
        q_per_kv, head_dim = heads // kv_heads, dim // heads
        return Config(vocab, dim, layers, kv_heads, q_per_kv, head_dim, hidden_dim, ctx, EPS, THETA, None, self.tied)

    def parts(self, config: Config) -> dict[str, tuple[int, ...]]:
        """The tensors of a file and their shapes, in its order."""
        shapes = all_tensors(LLAMA2C, config) | dict.fromkeys(TABLES, (config.ctx, config.head_dim // 2))
        names = {field: name[LLAMA2C.column] + ".weight" for field, name in NAMES.items()} | {t: t for t in TABLES}
        order = (names[field].format(layer) for field in ORDERS[self.version] for layer in range(config.layers))
        return {name: shapes[name] for name in order if name in shapes}

    def quantised(self, shape: tuple[int, ...]) -> bool:
        return self.version == 2 and len(shape) == 2

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """float32, or int8 followed by a float32 for each group. Groups run on from row to row, as upstream's do."""
        n = math.prod(shape)
        return n + 4 * (n // self.group) if self.quantised(shape) else 4 * n

    def size(self, config: Config) -> int:
        """The bytes of a whole file, from those with one layer and with two."""
        one, two = (sum(map(self.bytes_of, self.parts(replace(config, layers=n)).values())) for n in (1, 2))
        return self.length + one + (config.layers - 1) * (two - one)


def open_llama2c(path: Path, files: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A file in any of the three versions. Version 2 is dequantised to float32."""
    file = files.enter_context(open_file(path))
    header, size = Header.read(file, path), os.fstat(file.fileno()).st_size
    with blamed_on(path):
        config = header.config()
    need, other = header.size(config), header.size(replace(config, tied=not config.tied))
    hint = f" (or the other {'shared_classifier' if header.version else 'sign of vocab_size'})" * (size == other)
    check("size", counted(size, "byte"), size == need, f"{need}{hint}", path)
    shapes, places, offset = header.parts(config), dict[str, int](), header.length
    for name, shape in shapes.items():
        places[name], offset = offset, offset + header.bytes_of(shape)

    def get(name: str) -> Float[np.ndarray, "..."]:
        shape, begin, read = shapes[name], places[name], partial(read_at, file, path, name)
        n = math.prod(shape)
        if not header.quantised(shape):
            return read(begin, "<f4", n).reshape(shape)
        values = read(begin, "i1", n).reshape(-1, header.group)
        with np.errstate(all="ignore"):  # what is not finite is refused by name, and without numpy's warning
            return (values * read(begin + n, "<f4", len(values))[:, None]).reshape(shape)

    stated = {"version": header.version, **header.sizes, "shared_classifier": header.tied}
    stated |= {"group_size": header.group} if header.group else {}
    fields = {name: (value, "honoured") for name, value in stated.items()}
    fields |= {"norm_eps": (EPS, "defaulted"), "rope_theta": (THETA, "defaulted")}
    tensors = {
        name: Tensor(shape, "INT8" if header.quantised(shape) else "F32")
        for name, shape in shapes.items()
        if name not in TABLES
    }
    tokenizer = folder_tokenizer(path.parent, config.vocab)
    return Checkpoint(path, f"llama2.c {header.version}", LLAMA2C, config, fields, tensors, get, tokenizer)


def save_llama2c(model: Model, path: Path, _: str, version: int) -> None:
    """Write a model as upstream's export.py does, byte by byte. The version fixes the dtype."""
    config, must = model.config, partial(check, file="config")
    heads = config.kv_heads * config.q_per_kv
    must("theta", config.theta, config.theta == THETA, f"{THETA}, which llama2.c fixes")
    must("eps", config.eps, math.isclose(config.eps, EPS, rel_tol=1e-7), f"{EPS}, which llama2.c fixes")
    must("rope_scaling", config.rope_scaling, config.rope_scaling is None, "none, as llama2.c knows none")
    must("head_dim", config.head_dim, config.head_dim * heads == config.dim, "dim / heads, as llama2.c has it")
    sizes = (config.dim, config.hidden_dim, config.layers, heads, config.kv_heads, config.vocab, config.ctx)
    group = group_size(config) if version == 2 else 0
    header = Header(version, dict[str, int](zip(SIZES, sizes, strict=True)), config.tied, group)
    get = to_named(LLAMA2C, model.params, config)
    trigonometric = dict(zip(TABLES, tables(config), strict=True)) if version == 0 else {}
    with path.open("xb") as file:
        file.write(header.pack())
        for name, shape in header.parts(config).items():
            array = trigonometric[name] if name in TABLES else narrowed(get(name), "float32", name)
            for part in quantise(array, group) if header.quantised(shape) else (array,):
                file.write(part.astype(part.dtype.newbyteorder("<"), "C", copy=False).data)
    for name, data in tokenizer_beside(model.tokenizer, config.vocab).items():
        with path.with_name(name).open("xb") as file:
            file.write(data)


def is_llama2c(path: Path) -> bool:
    """Whether a file has the size that its header tells."""
    try:
        with open_file(path) as file:
            header = Header.read(file, path)
            return header.size(header.config()) == os.fstat(file.fileno()).st_size
    except LlamaError:
        return False


def unknown_to_llama2c(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer states and run.c does not know, though much of it goes into tokenizer_config.json beside."""
    stops = sorted(tokenizer.stops - usual_stops(tokenizer))
    stated = {"stops": stops, "template": tokenizer.template or tokenizer.templates, "sampling": tokenizer.stated}
    settings = {name: value for name, value in tokenizer.settings.items() if name != "unk_token"}  # the first piece
    return {name: value for name, value in stated.items() if value} | settings


def tokenizer_beside(tokenizer: Tokenizer | None, vocab: int) -> dict[str, bytes]:
    """The files that hold a tokenizer; a tokenizer.bin is among them if run.c can use the tokenizer for the model."""
    if tokenizer is None:
        return {}
    files = tokenizer_files(tokenizer)
    try:
        made = tokenizer_bin(tokenizer)
        bin_tokenizer(made, "tokenizer.bin", vocab)
    except LlamaError:
        return files
    return files | {"tokenizer.bin": made}


def group_size(config: Config) -> int:
    """64, halved until it divides the rows of every matrix, as runq.c needs it.

    Upstream's exporter looks at dim alone, and so at stories42M writes groups that cross the rows of w2, of 1376:
    issues 532 and 533 there.
    """
    return math.gcd(64, config.dim, config.hidden_dim)


def quantise(
    array: Float[np.ndarray, "..."], group: int
) -> tuple[Int8[np.ndarray, "groups group"], Float[np.ndarray, " groups"]]:
    """Whole numbers from −127 to 127, and for each group of them its largest absolute value / 127."""
    groups = array.reshape(-1, group)
    scale = np.abs(groups).max(axis=1) / np.float32(127)
    return np.rint(groups / np.where(scale == 0, np.float32(1), scale)[:, None]).astype(np.int8), scale


def tables(config: Config) -> tuple[Float[np.ndarray, "ctx pairs"], Float[np.ndarray, "ctx pairs"]]:
    """Cosines and sines of the rotary angles in float32: torch's where it is installed, as upstream's are.

    Its last bits are its own.
    """
    pairs = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    angles = np.outer(np.arange(config.ctx).astype(np.float32), np.float32(1) / np.float32(config.theta) ** pairs)
    if importlib.util.find_spec("torch") is None:
        return np.cos(angles), np.sin(angles)
    torch: Any = importlib.import_module("torch")
    return torch.from_numpy(angles).cos().numpy(), torch.from_numpy(angles).sin().numpy()
