"""GGUF, llama.cpp's format: a bounded scan of the header, then tensors dequantised by the `gguf` package."""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, check, check_tensors, rope_frequencies

from ..extras import extra
from ..layout import GGUF, all_tensors, from_named, rope_scaling
from ..tokens import Tokenizer, byte_level_bpe, template_environment
from . import Model, blamed_on, check_memory, finite

FREQUENCIES = "rope_freqs.weight"  # by what llama.cpp divides the frequencies of rotary pairs


def gguf_field(fields: Mapping[str, Any], name: str, path: Path, *default: Any) -> Any:
    """The value of a key, or the default where there is one."""
    check(name, "nothing", name in fields or bool(default), "a value", path)
    return fields.get(name, *default)


def scan_gguf(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """The fields of a GGUF, the (shape, type, offset) of its tensors, and where the data begins.

    github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3. Every size is compared with the file's before memory is
    taken for it. Shapes are stored last axis first, and reversed here.
    """
    must, size = partial(check, file=path), os.fstat(file.fileno()).st_size
    codes = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 8), "BbHhIif?QqdQ", strict=True))  # 8: a string's length
    widths = {kind: struct.calcsize(f"<{code}") for kind, code in codes.items()}

    def take(n: int) -> bytes:
        if n > size - file.tell():
            raise LlamaError(path, "size", f"{size} bytes", f"{n} more at byte {file.tell()}")
        return file.read(n)

    def numbers(code: str, n: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{code}", take(n * struct.calcsize(f"<{code}")))

    def string() -> str:
        try:
            return take(*numbers("Q")).decode()
        except UnicodeDecodeError as error:
            raise LlamaError(path, "string", f"other bytes before byte {file.tell()}", "UTF-8") from error

    def value(name: str) -> Any:
        (kind,), n = numbers("I"), 1
        if array := kind == 9:
            kind, n = *numbers("I"), *numbers("Q")
        must(name, f"type {kind}", kind in codes, "a number, a string or an array of these")
        must(name, f"{n} values", n * widths[kind] <= size - file.tell(), "no more than fit into the file")
        values = [string() for _ in range(n)] if kind == 8 else list(numbers(codes[kind], n))
        return values if array else values[0]

    must("magic", magic := take(4), magic == b"GGUF", b"GGUF")
    must("version", version := numbers("I")[0], version in (2, 3), "2 or 3, little-endian")
    n_tensors, n_fields = numbers("Q", 2)
    must("counts", (n_tensors, n_fields), 32 * n_tensors + 13 * n_fields <= size, "no more than fit into the file")
    fields, found = dict[str, Any](), dict[str, tuple[tuple[int, ...], int, int]]()
    for _ in range(n_fields):
        name = string()
        must(name, "two values", name not in fields, "one")
        fields[name] = value(name)
    for _ in range(n_tensors):
        name, (axes,) = string(), numbers("I")
        must(name, f"{axes} axes", 1 <= axes <= 4, "1 to 4")
        must(name, "two tensors", name not in found, "one")
        found[name] = numbers("Q", axes)[::-1], *numbers("I"), *numbers("Q")
    alignment = fields.get("general.alignment", 32)
    fits = type(alignment) is int and 8 <= alignment <= 2**16 and alignment % 8 == 0
    must("general.alignment", alignment, fits, "a multiple of 8, at most 65536")
    for name, (_, _, offset) in found.items():
        must(name, f"offset {offset}", offset % alignment == 0, f"a multiple of {alignment}")
    return fields, found, -(-file.tell() // alignment) * alignment


def gguf_config(fields: Mapping[str, Any], found: Mapping[str, tuple[tuple[int, ...], int, int]], path: Path) -> Config:
    """The config that the keys `llama.…` describe. A key that is not known here is refused: it may change the maths."""
    must, asked = partial(check, file=path), {"llama.vocab_size"}

    def field(name: str, kind: type, *default: Any) -> Any:
        asked.add(name)
        value = gguf_field(fields, name, path, *default)
        must(name, repr(value), type(value) is kind, f"a value of type {kind.__name__}")
        return value

    architecture = field("general.architecture", str)
    must("general.architecture", architecture, architecture == "llama", "llama")
    size = partial(field, kind=int)
    must("token_embd.weight", "none", "token_embd.weight" in found, "a tensor")
    dim, heads = size("llama.embedding_length"), size("llama.attention.head_count")
    must("llama.attention.head_count", heads, heads > 0 and dim % heads == 0, f"a divisor of {dim}")
    kv_heads = field("llama.attention.head_count_kv", int, heads)
    must("llama.attention.head_count_kv", kv_heads, kv_heads > 0 and heads % kv_heads == 0, f"a divisor of {heads}")
    head_dim = field("llama.attention.key_length", int, dim // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        width = field(name, int, head_dim)
        must(name, width, width == head_dim, head_dim)
    names = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings"}
    scaling = {ours: fields[key] for name, ours in names.items() if (key := f"llama.rope.scaling.{name}") in fields}
    if scaling.get("rope_type") == "none":
        scaling = {}
    with blamed_on(path):
        config = Config(
            vocab=found["token_embd.weight"][0][0],
            dim=dim,
            layers=size("llama.block_count"),
            kv_heads=kv_heads,
            q_per_kv=heads // kv_heads,
            head_dim=head_dim,
            hidden_dim=size("llama.feed_forward_length"),
            ctx=size("llama.context_length"),
            eps=float(f"{field('llama.attention.layer_norm_rms_epsilon', float):.7g}"),  # 1e-05 again, after float32
            theta=field("llama.rope.freq_base", float, 1e4),
            rope_scaling=rope_scaling(scaling, path),
            tied="output.weight" not in found,
        )
    asked |= {f"llama.rope.scaling.{name}" for name in names}
    unknown = [name for name in fields if name.startswith("llama.") and name not in asked]
    must(", ".join(unknown), "a value", not unknown, "no unknown field")
    vocab = fields.get("llama.vocab_size", config.vocab)
    must("llama.vocab_size", vocab, vocab == config.vocab, f"{config.vocab}, the rows of token_embd.weight")
    must("llama.block_count", config.layers, config.layers <= len(found), f"no more than the {len(found)} tensors")
    return config


def gguf_tokenizer(fields: Mapping[str, Any], vocab: int, path: Path) -> Tokenizer:
    """The tokenizer that the keys `tokenizer.…` describe: byte-level BPE that splits as SmolLM2's does."""

    def field(name: str, *default: Any) -> Any:
        return gguf_field(fields, f"tokenizer.ggml.{name}", path, *default)

    def must(name: str, got: object, ok: bool, expected: object) -> None:
        check(f"tokenizer.ggml.{name}", got, ok, expected, path)

    must("model", field("model"), field("model") == "gpt2", "gpt2")
    must("pre", field("pre"), field("pre") == "smollm", "smollm")
    names, kinds, merges = field("tokens"), field("token_type"), field("merges")
    bos, eos, adds_bos = field("bos_token_id", None), field("eos_token_id", None), field("add_bos_token", False)
    template = fields.get("tokenizer.chat_template")
    for name, values, kind, n in (
        ("tokens", names, str, vocab),
        ("token_type", kinds, int, vocab),
        ("merges", merges, str, None),
    ):
        expected = f"{n or 'any number'} of type {kind.__name__}"
        must(name, f"a value of type {type(values).__name__}", type(values) is list, expected)
        right = all(type(value) is kind for value in values) and n in (None, len(values))
        must(name, f"{len(values)} values", right, expected)
    normal, control = 1, 3
    must("token_type", set(kinds), set(kinds) <= {normal, 2, control, 4, 5, 6}, "1 to 6")
    for name, i in (("bos_token_id", bos), ("eos_token_id", eos)):
        must(name, i, i is None or (type(i) is int and 0 <= i < vocab), f"an id from 0 to {vocab - 1}")
    must("add_bos_token", adds_bos, type(adds_bos) is bool, "true or false")
    check("tokenizer.chat_template", template, template is None or type(template) is str, "a text", path)
    must("bos_token_id", "none", bos is not None or not adds_bos, "an id, as add_bos_token is true")
    try:
        template_environment().parse(template or "")
    except Exception as error:
        raise LlamaError(path, "tokenizer.chat_template", "a syntax error", "a jinja2 template") from error
    specials = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind != normal}
    controls = {i for i, kind in enumerate(kinds) if kind == control}
    ends = [specials[name] for name in ("<|endoftext|>", "<|im_end|>") if name in specials]
    tokenizer = byte_level_bpe(names, merges, specials, controls, must)
    stops = frozenset({*ends, eos} - {None})
    return tokenizer._replace(stops=stops, bos=bos, eos=eos, adds_bos=adds_bos, template=template)


def load_gguf(file: BinaryIO, path: Path) -> Model:
    """A model in float32. Rows of q and k lie in neighbouring pairs, as ours do."""
    lib, must = extra("gguf", "chat"), partial(check, file=path)
    fields, found, data = scan_gguf(file, path)
    config = gguf_config(fields, found, path)
    frequencies = {FREQUENCIES: (config.head_dim // 2,)} if FREQUENCIES in found else {}
    expected = all_tensors(GGUF, config) | frequencies
    check_tensors(expected, {name: shape for name, (shape, _, _) in found.items()}, path)
    end, places = os.fstat(file.fileno()).st_size, dict[str, tuple[int, int]]()
    for name, (shape, kind, offset) in found.items():
        must(name, f"type {kind}", kind in set(lib.GGMLQuantizationType), "a type that the gguf package knows")
        block, width = lib.GGML_QUANT_SIZES[kind]
        must(name, f"rows of {shape[-1]}", shape[-1] % block == 0, f"a multiple of {block}")
        places[name] = data + offset, math.prod(shape) // block * width
        must(name, f"bytes {data + offset} to {sum(places[name])}", sum(places[name]) <= end, f"an end within {end}")
    apart = all(sum(a) <= b for a, (b, _) in pairwise(sorted(places.values())))
    must("tensors", "two that overlap", apart, "each in a place of its own")
    check_memory(config, path)
    tokenizer = gguf_tokenizer(fields, config.vocab, path)

    def get(name: str) -> Float[np.ndarray, "..."]:
        shape, kind, _ = found[name]
        file.seek(places[name][0])
        # The package dequantises 16 rows at a time. Blocks ignore rows, so rows here are as long as a cache likes.
        raw = np.fromfile(file, np.uint8, places[name][1]).reshape(math.gcd(math.prod(shape[:-1]), 2048), -1)
        try:
            return finite(lib.quants.dequantize(raw, lib.GGMLQuantizationType(kind)), name, path)
        except NotImplementedError as error:
            raise LlamaError(path, name, lib.GGMLQuantizationType(kind).name, "a type of weights") from error

    if frequencies:
        unscaled = rope_frequencies(replace(config, rope_scaling=None))
        same = np.allclose(get(FREQUENCIES), np.asarray(unscaled / rope_frequencies(config)), rtol=1e-5, atol=0)
        must(FREQUENCIES, "other frequencies", same, "those that the scaling in llama.rope gives")
    return Model(config, from_named(GGUF, get, config), tokenizer)
