"""GGUF, llama.cpp's format: configs from its fields, tensors dequantised by the `gguf` package; and writing it."""

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from lovely_llama import Config, Sampling, check, check_sampling, check_tensors

from ..extras import extra, progress
from ..tokens import Tokenizer, gguf_tokenizer, tokenizer_fields
from .gguf_header import Stored, read_header, shortest
from .gguf_rope import FREQUENCIES, OWN, OWN_PREFIX, factors_of, read_scaling, scaling_of, write_scaling
from .layout import GGUF, all_tensors, to_named
from .model import DTYPES, Checkpoint, Model, Tensor, blamed_on, finite, narrowed, read_at, widened

PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}

# Keys that leave the mathematics as it is if they have one of these values; any value if there are none.
NEUTRAL = {
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.attention.causal": (True,),
    "llama.rope.scale_linear": (1.0,),
    "llama.rope.scaling.yarn_beta_fast": (32.0,),
    "llama.rope.scaling.yarn_beta_slow": (1.0,),
    "llama.rope.scaling.yarn_ext_factor": (1.0,),
    "llama.rope.scaling.yarn_attn_factor": (1.0,),
    "llama.use_parallel_residual": (False,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.embedding_scale": (1.0,),
    "llama.residual_scale": (1.0,),
    "llama.logit_scale": (1.0,),
    "llama.pooling_type": (0,),
    "llama.expert_shared_count": (0,),
    "llama.leading_dense_block_count": (0,),
    "llama.rope.scaling.finetuned": (),
    "llama.tensor_data_layout": ("Meta AI original pth",),
}
# The samplers under `general.sampling`, and the values with which they do nothing.
SAMPLING = {
    "repetition_penalty": ("penalty_repeat", 1.0),
    "temperature": ("temp", 1.0),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
}

# ---- Fields ----------------------------------------------------------------------------------------------------------


class Fields:
    """The fields of a GGUF, and which of them have been asked for."""

    def __init__(self, found: Mapping[str, Any], path: Path) -> None:
        self.found, self.path, self.asked = found, path, dict[str, tuple[Any, str]]()

    def get(self, name: str, kind: type, *default: Any) -> Any:
        """The value of a key, of this type, or the default where there is one."""
        check(name, "nothing", name in self.found or bool(default), "a value", self.path)
        value = self.found.get(name, *default)
        check(name, f"{value!r:.99}", type(value) is kind, f"a value of type {kind.__name__}", self.path)
        self.asked[name] = value, "honoured" if name in self.found else "defaulted"
        return value

    def given(self, prefix: str, names: Mapping[str, type]) -> dict[str, Any]:
        """The values of those keys that are there, without their prefix."""
        return {name: self.get(prefix + name, kind) for name, kind in names.items() if prefix + name in self.found}

    def all(self, allow: Collection[str] = ()) -> dict[str, tuple[Any, str]]:
        """All fields with their status. An unknown one of the architecture is refused: it may change the maths."""
        neutral = {
            name
            for name, values in NEUTRAL.items()
            if name in self.found and (not values or self.found[name] in values)
        }
        used, fields = ("tokenizer.", "split.", "general.alignment"), dict(self.asked)
        for name in [name for name in self.found if name not in fields]:
            fields[name] = self.found[name], "honoured" if name.startswith(used) else "ignored"
        known = {*self.asked, *neutral, *allow}
        unknown = [name for name in fields if name.startswith("llama.") and name not in known]
        check(", ".join(unknown), "a value", not unknown, "no unknown field (--allow reads on)", self.path)
        return fields


def gguf_config(fields: Fields, tensors: Mapping[str, Stored]) -> Config:
    """The config that the keys `llama.…` describe, but for a scaling in `rope_freqs.weight`."""
    must, path = partial(check, file=fields.path), fields.path
    architecture, kind = fields.get("general.architecture", str), fields.get("general.type", str, "model")
    must("general.architecture", architecture, architecture == "llama", "llama")
    must("general.type", kind, kind == "model", "model")
    size = partial(fields.get, kind=int)
    must("token_embd.weight", "none", "token_embd.weight" in tensors, "a tensor")
    dim, heads = size("llama.embedding_length"), size("llama.attention.head_count")
    whole = "llama.attention.key_length" in fields.found or (heads > 0 and dim % heads == 0)
    must("llama.attention.head_count", heads, heads > 0 and whole, f"a divisor of {dim}")
    kv_heads = fields.get("llama.attention.head_count_kv", int, heads)
    must("llama.attention.head_count_kv", kv_heads, kv_heads > 0 and heads % kv_heads == 0, f"a divisor of {heads}")
    head_dim = fields.get("llama.attention.key_length", int, dim // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        width = fields.get(name, int, head_dim)
        must(name, width, width == head_dim, head_dim)
    kinds = {"type": str, "factor": float, "original_context_length": int, "attn_factor": float}
    with blamed_on(path):
        config = Config(
            vocab=tensors["token_embd.weight"].shape[0],
            dim=dim,
            layers=size("llama.block_count"),
            kv_heads=kv_heads,
            q_per_kv=heads // kv_heads,
            head_dim=head_dim,
            hidden_dim=size("llama.feed_forward_length"),
            ctx=size("llama.context_length"),
            eps=fields.get("llama.attention.layer_norm_rms_epsilon", float),
            theta=fields.get("llama.rope.freq_base", float, 1e4),
            rope_scaling=read_scaling(fields.given("llama.rope.scaling.", kinds), path),
            tied="output.weight" not in tensors,
        )
    vocab = fields.get("llama.vocab_size", int, config.vocab)
    must("llama.vocab_size", vocab, vocab == config.vocab, f"{config.vocab}, the rows of token_embd.weight")
    most = f"at most {len(tensors)}, the number of tensors"
    must("llama.block_count", config.layers, config.layers <= len(tensors), most)
    return config


def gguf_sampling(fields: Fields, vocab: int) -> dict[str, Any]:
    """What a file recommends, as fields of a tokenizer; what it leaves open is as usual."""
    stated = fields.given("general.sampling.", {name: type(neutral) for name, neutral in SAMPLING.values()})
    if not stated:
        return {}
    if stated.get("top_k", 0) > vocab:
        stated["top_k"] = vocab
    values = {
        field: None if stated[name] == neutral else stated[name]
        for field, (name, neutral) in SAMPLING.items()
        if name in stated
    }
    sampling = Sampling(**values)
    check_sampling(sampling, vocab, fields.path)
    return {"sampling": sampling, "unstated": frozenset(Sampling._fields) - values.keys()}


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_tensor(tensors: Mapping[str, Stored], path: Path, name: str) -> Float[np.ndarray, "..."]:
    """A tensor in float32, float16 or bfloat16 as it is stored, or dequantised to float32."""
    tensor = tensors[name]
    raw = read_at(tensor.file, path, name, tensor.begin, np.uint8, tensor.size)
    if tensor.kind in PLAIN:
        return raw.view(PLAIN[tensor.kind]).reshape(tensor.shape)
    lib = extra("gguf", "chat")
    # The package dequantises 16 rows at a time. Blocks ignore rows, so rows here are as long as a cache likes.
    raw = raw.reshape(math.gcd(math.prod(tensor.shape[:-1]), 2048), -1)
    with np.errstate(all="ignore"):  # an infinite scale shows in the result
        array = lib.quants.dequantize(raw, lib.GGMLQuantizationType[tensor.kind])
    return array.reshape(tensor.shape)


def open_gguf(path: Path, files: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A GGUF, or all parts of a split one, by any of them. Rows of q and k lie in neighbouring pairs, as ours do."""
    found, tensors = read_header(path, files)
    if any(tensor.kind not in PLAIN for tensor in tensors.values()):
        extra("gguf", "chat")
    fields, get = Fields(found, path), partial(read_tensor, tensors, path)
    config = gguf_config(fields, tensors)
    frequencies = {FREQUENCIES: (config.head_dim // 2,)} if FREQUENCIES in tensors else {}
    expected = all_tensors(GGUF, config) | frequencies
    check_tensors(expected, {name: tensor.shape for name, tensor in tensors.items()}, path)
    if frequencies:
        factors = finite(widened(get(FREQUENCIES)), FREQUENCIES, path)
        scaling = scaling_of(factors, config, fields.given(OWN_PREFIX, OWN), path)
        config = replace(config, rope_scaling=scaling)
    has_tokenizer = any(name.startswith("tokenizer.") for name in found)
    tokenizer = gguf_tokenizer(found, config.vocab, path) if has_tokenizer else None
    recommended = gguf_sampling(fields, config.vocab)
    tokenizer = tokenizer and tokenizer._replace(**recommended)
    shown = {name: Tensor(tensor.shape, tensor.kind) for name, tensor in tensors.items()}
    return Checkpoint(path, "GGUF", GGUF, config, fields.all(allow), shown, get, tokenizer)


# ---- Writing ---------------------------------------------------------------------------------------------------------


# How matrices may be written: ggml's type, and what llama.cpp calls a file of them.
WRITTEN = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7)}


def written_as(shape: tuple[int, ...], dtype: str) -> str:
    """How llama.cpp writes a tensor: gains in float32, and rows that do not make blocks of 32 in float16."""
    if len(shape) == 1:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % 32 else dtype


def encoded(array: Float[np.ndarray, "..."], dtype: str, name: str) -> Any:
    """A tensor as it is stored. Numbers that are too large for it are refused."""
    if dtype in DTYPES:
        return narrowed(widened(array), dtype, name)
    lib, rows = extra("gguf", "chat"), narrowed(widened(array), "float32", name)
    rows = rows.reshape(math.gcd(math.prod(rows.shape[:-1]), 2048), -1)
    largest, limit = float(max(rows.max(), -rows.min())), 127 * float(np.finfo(np.float16).max)
    check(name, f"numbers up to {largest:.3g}", largest <= limit, f"at most {limit:.3g} for {dtype}", "params")
    with np.errstate(all="ignore"):  # the inverse of a tiny scale
        return lib.quants.quantize(rows, lib.GGMLQuantizationType[WRITTEN[dtype][0]])


def config_fields(config: Config) -> dict[str, Any]:
    """The keys `llama.…` of a config. Numbers are stored in float32; those that it does not hold are refused."""
    heads = config.kv_heads * config.q_per_kv
    fields = {
        "llama.vocab_size": config.vocab,
        "llama.context_length": config.ctx,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.theta),
    }
    if config.head_dim * heads != config.dim:
        fields |= dict.fromkeys(("llama.attention.key_length", "llama.attention.value_length"), config.head_dim)
    fields |= write_scaling(config.rope_scaling)
    for name, value in fields.items():
        exact = not isinstance(value, float) or shortest(value) == value
        check(name, value, exact, "a number that float32 holds", "config")
    return fields


def sampling_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys `general.sampling.…` of what is stated: those for a sampler that is left out do nothing."""
    values = {SAMPLING[field]: value for field, value in tokenizer.stated.items()}
    return {
        f"general.sampling.{name}": neutral if value is None else type(neutral)(value)
        for (name, neutral), value in values.items()
    }


def save_gguf(model: Model, path: Path, dtype: str) -> None:
    """Write a GGUF that llama.cpp reads, tensor by tensor, with matrices in one of `WRITTEN`.

    As llama.cpp does, gains are always written in float32, and matrices whose rows are not a multiple of 32 in float16
    where q8_0 is asked for. A scaling of llama3 is written as llama.cpp's converter does, as factors of frequencies.
    """
    lib, config, params = extra("gguf", "chat"), model.config, model.params
    get, shapes = to_named(GGUF, params, config), all_tensors(GGUF, config)
    fields = {"general.type": "model", "general.name": path.stem, "general.file_type": WRITTEN[dtype][1]}
    fields |= {"general.quantization_version": 2} if dtype == "q8_0" else {}
    fields |= config_fields(config)
    if model.tokenizer:
        fields |= sampling_fields(model.tokenizer) | tokenizer_fields(model.tokenizer, config.vocab)
    writer = lib.GGUFWriter(path, "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for name, value in fields.items():
        add.get(type(value), writer.add_array)(name, value)
    if config.rope_scaling and config.rope_scaling.kind == "llama3":
        shapes |= {FREQUENCIES: (config.head_dim // 2,)}
    kinds = {name: written_as(shape, dtype) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        kind = lib.GGMLQuantizationType[WRITTEN[kinds[name]][0]]
        block, width = lib.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * width, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(f"writing {path.name}", len(shapes)) as advance:
            for name in shapes:
                array = factors_of(config) if name == FREQUENCIES else get(name)
                writer.write_tensor_data(encoded(array, kinds[name], name))
                advance(1)
    finally:
        writer.close()
