"""Test data: configs, parameters, tokenizers, models, and files that hold them."""

import functools
import inspect
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import gguf
import jax
import numpy as np
import sentencepiece
from asserts import assert_close, jit
from jax import numpy as jnp
from safetensors import safe_open

from lovely_llama import Block, Config, Params, RopeScaling, shapes
from lovely_llama_tools.formats.layout import GGUF, Layout, all_tensors
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.tokens import Tokenizer

Arrays = dict[str, "np.ndarray[tuple[int, ...], Any]"]

# ---- Configs and parameters ------------------------------------------------------------------------------------------

# Sizes differ pairwise, the heads together are not as wide as dim, and eps, theta and scaling are unusual.
# With this theta and original context, a head's five pairs cover all three bands of llama3's scaling.
SMALL = Config(
    vocab=29, dim=14, layers=2, kv_heads=3, q_per_kv=4, head_dim=10, hidden_dim=19, ctx=131, eps=3e-4, theta=700.0,
    rope_scaling=RopeScaling("llama3", 3.0, 40, low=1.0, high=4.0), tied=False,
)  # fmt: skip


def random_params(config: Config, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Random parameters: gains 1 ± ½, and matrices that preserve a vector's norm on average."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = rng.standard_normal(leaf.shape)
        if "norm" in path[-1].name:
            return jnp.array(1 + drawn / 2, dtype)
        fan_in = math.prod(leaf.shape[1:]) if path[-1].name == "o" else leaf.shape[-1]
        return jnp.array(drawn / math.sqrt(fan_in), dtype)

    return jax.tree.map_with_path(draw, shapes(config))


def layers_of(params: Params) -> tuple[Block, ...]:
    """The blocks, which must be in a tuple."""
    assert not isinstance(params.blocks, Block)
    return params.blocks


def cache_name(oracle: Any) -> str:
    """What transformers' model calls its cache, by the new name or the old one."""
    return "cache" if "cache" in inspect.signature(oracle.forward).parameters else "past_key_values"


def random_arrays(layout: Layout, config: Config, seed: int) -> Arrays:
    """Normally distributed tensors, under the names of a format."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in all_tensors(layout, config).items()}


# ---- Recordings of llama2.c ------------------------------------------------------------------------------------------

LLAMA2_C = Path(__file__).resolve().parent.parent / "llama2_c"
RECORDED = [f"{name}_{embedding}" for name in ("mha", "gqa", "mqa", "deep") for embedding in ("tied", "untied")]


class Recording(NamedTuple):
    """llama2.c's results for one config, under the names in llama2_c/record.py."""

    config: Config
    arrays: dict[str, Any]
    train: dict[str, Any]  # the settings of its optimiser

    @classmethod
    def of(cls, arrays: dict[str, Any], metadata: dict[str, str]) -> Self:
        args = json.loads(metadata["config"])
        heads, kv_heads = args["n_heads"], args["n_kv_heads"]
        config = Config(
            vocab=args["vocab_size"], dim=args["dim"], layers=args["n_layers"], kv_heads=kv_heads,
            q_per_kv=heads // kv_heads, head_dim=args["dim"] // heads, hidden_dim=args["hidden_dim"],
            ctx=args["max_seq_len"], eps=args["norm_eps"], theta=1e4, rope_scaling=None, tied=args["tied"],
        )  # fmt: skip
        return cls(config, arrays, json.loads(metadata["train"]))

    def under(self, prefix: str) -> dict[str, Any]:
        """The arrays whose names start with the prefix, by the rest of their names."""
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    def check(self, name: str, function: Callable[..., dict[str, Any]], what: str) -> None:
        """Compare one function's "value" or "gradient". It takes and returns the recorded arrays by name."""
        args, outs, cotangents, grads = (self.under(f"{name}.{kind}") for kind in ("in.", "out", "cotangent", "grad."))
        config = replace(self.config, layers=1, tied=True)  # neither matters here; fixed, they save compilations
        value, gradient = value_and_gradient(function, config, args, cotangents)
        if what == "value":
            assert_close(value, outs, 1e-5, name)
        else:
            assert_close(gradient, grads, 5e-5, name)


@partial(jit, static_argnums=(0, 1))
def value_and_gradient(function: Callable[..., Any], config: Config, args: Any, cotangents: Any) -> tuple[Any, Any]:
    value, pull = jax.vjp(partial(function, config=config), args)
    return value, pull(cotangents)[0]


def read_recording(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(LLAMA2_C / f"{name}.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@functools.cache
def load_recording(name: str) -> Recording:
    return Recording.of(*read_recording(name))


# ---- Tokenizers ------------------------------------------------------------------------------------------------------


def write_sentencepiece(path: Path, pieces: int) -> None:
    """Write a SentencePiece model with this many pieces."""
    text = ["the sky is blue", "the sea is blue too", "why is the sky so blue", "so it goes"] * 3
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=pieces, model_type="bpe", minloglevel=2
        )


def letter_tokenizer(pieces: Sequence[bytes], stops: Sequence[int] = (), prefix: bytes = b"") -> Tokenizer:
    """A tokenizer with one token per character."""

    def encode(text: str, special: bool) -> list[int]:
        return [pieces.index(character.encode()) for character in text]

    return Tokenizer(encode, pieces, {"<s>": 0, "</s>": 1}, frozenset(stops), 0, True, prefix, None)


# GPT-2's letters for bytes, in byte order: invisible ones are moved to U+0100 and beyond.
SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
LETTERS = [chr(b) if b in SEEN else chr(256 + UNSEEN.index(b)) for b in range(256)]
SPECIALS, MERGES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["Ġ t", "h e", "Ġt he", "Ã ©"]  # the last is é
TOKENS = [*SPECIALS, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer of a model that has one."""
    assert model.tokenizer
    return model.tokenizer


# ---- Models ----------------------------------------------------------------------------------------------------------


def counting_model(pieces: Sequence[bytes], stops: Sequence[int] = (), ctx: int = 64) -> Model:
    """A Llama that counts: token t is followed by t + 1. Its layers add nothing; embeddings are one-hot."""
    vocab = 32
    config = Config(vocab, vocab, 1, 1, 1, 2, 3, ctx, 1e-5, 1e4, None, False)
    params, eye = jax.tree.map(lambda w: jnp.zeros(w.shape), shapes(config)), jnp.eye(vocab)
    params = params._replace(embed=eye, norm=jnp.ones(vocab), unembed=jnp.roll(eye, 1, axis=0))
    padded = [b"", *pieces, *[b"~"] * (vocab - 1 - len(pieces))]
    return Model(config, params, letter_tokenizer(padded, stops))


# ---- llama2.c's files ------------------------------------------------------------------------------------------------

LLAMA2C_ORDER = (
    "tok_embeddings", "layers.{}.attention_norm", "layers.{}.attention.wq", "layers.{}.attention.wk",
    "layers.{}.attention.wv", "layers.{}.attention.wo", "layers.{}.ffn_norm", "layers.{}.feed_forward.w1",
    "layers.{}.feed_forward.w2", "layers.{}.feed_forward.w3", "norm",
)  # fmt: skip


def write_llama2c(path: Path, config: Config, arrays: Mapping[str, Any]) -> Path:
    """Write a tied model in version 0, the one that run.c reads."""
    heads = config.kv_heads * config.q_per_kv
    sizes = (config.dim, config.hidden_dim, config.layers, heads, config.kv_heads, config.vocab, config.ctx)
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *sizes))
        for name in LLAMA2C_ORDER:
            for full in dict.fromkeys(name.format(layer) for layer in range(config.layers)):
                file.write(arrays[f"{full}.weight"].astype("<f4").tobytes())
        file.write(bytes(4 * config.ctx * config.head_dim))  # tables of cosines and sines, ignored when read
    return path


# ---- GGUF ------------------------------------------------------------------------------------------------------------

TINY = Config(len(TOKENS), 32, 2, 2, 2, 8, 24, 64, 1e-5, 1e4, None, True)


def tiny_fields(config: Config = TINY) -> dict[str, Any]:
    """The metadata fields of a GGUF."""
    heads = config.kv_heads * config.q_per_kv
    widths = {} if config.head_dim * heads == config.dim else {"llama.attention.key_length": config.head_dim}
    return widths | {
        "llama.block_count": config.layers,
        "llama.context_length": config.ctx,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.eps,
        "llama.rope.freq_base": config.theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def tiny_arrays(config: Config = TINY, seed: int = 0, scale: float = 0.3) -> Arrays:
    return {name: np.float32(scale) * array for name, array in random_arrays(GGUF, config, seed).items()}


def write_gguf(
    path: Path, fields: Mapping[str, Any], arrays: Mapping[str, Any], quantised: Iterable[str] = (),
    kind: str = "Q8_0", split: int = 0,
) -> Path:  # fmt: skip
    """Write a GGUF with the gguf package, some tensors quantised, in files of at most so many tensors."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    if not split:
        writer.add_custom_alignment(64)  # so that jax could alias mapped memory if it were not copied
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in fields.items():
        add[type(value)](name, value)
    for name, array in arrays.items():
        if name in quantised:
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, blocks(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(array: "np.ndarray[Any, Any]", kind: gguf.GGMLQuantizationType) -> "np.ndarray[Any, Any]":
    """An array quantised by the gguf package, or random blocks of a type that it only reads."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    scales = {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
        "IQ4_XS": (0,), "IQ3_S": (0,),
    }.get(kind.name)  # fmt: skip
    if not scales:
        return gguf.quants.quantize(array, kind)
    rng = np.random.default_rng(array.size)
    raw = rng.integers(0, 256, (array.size // block, width), np.uint8)
    for at in scales:
        raw[:, at : at + 2] = rng.normal(size=(len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(*array.shape[:-1], -1)


def write_talker(path: Path, says: str = "abcdefgh", ctx: int = 64) -> Path:
    """Write a model that generates only these letters: all hidden states, and their unembeddings, lie on one side."""
    config = replace(TINY, tied=False, ctx=ctx)
    arrays, spoken = tiny_arrays(config), [TOKENS.index("Ã©" if letter == "é" else letter) for letter in says]
    arrays = {name: array / 5 if "blk" in name else array for name, array in arrays.items()}
    arrays["token_embd.weight"] += 1
    arrays["output_norm.weight"] = np.ones(config.dim, np.float32)
    arrays["output.weight"] -= 1
    noise = tiny_arrays(config, seed=1)["output.weight"][spoken]
    arrays["output.weight"][spoken] = 1 + 1.5 * (noise - noise.mean(axis=1, keepdims=True))
    return write_gguf(path, tiny_fields(config), arrays)


# The parts of a GGUF, for files that the package would not write.


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A field's type and value. Bytes are passed through."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        items = [typed(item) for item in value]  # pyright: ignore
        kind = items[0][:4] if items else struct.pack("<I", 8)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{code[1]}", code[0], value)


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # as a GGUF has it, last axis first
    kind: int
    offset: int


class File(NamedTuple):
    """The parts of a GGUF."""

    fields: tuple[tuple[str | bytes, Any], ...]
    tensors: tuple[Tensor, ...]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None

    def pack(self) -> bytes:
        counts = self.counts or (len(self.tensors), len(self.fields))
        out = self.magic + struct.pack("<IQQ", self.version, *counts)
        out += b"".join(text(name) + typed(value) for name, value in self.fields)
        for tensor in self.tensors:
            out += text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            out += struct.pack("<IQ", tensor.kind, tensor.offset)
        return out + bytes(-len(out) % 32) + self.data


@functools.cache
def tiny_file() -> File:
    tensors, data = list[Tensor](), b""
    for name, array in tiny_arrays().items():
        tensors.append(Tensor(name, array.shape[::-1], 0, len(data)))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    return File((("general.architecture", "llama"), *tiny_fields().items()), tuple(tensors), data)
