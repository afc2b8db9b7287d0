"""GGUF: files are read bit for bit as they were written; invalid files are refused, with the field named."""

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from asserts import assert_close, assert_refused
from builders import TINY, TOKENS, File, layers_of, text, tiny_arrays, tiny_fields, tiny_file, tokenizer_of, write_gguf

from lovely_llama import CONFIGS, Config, LlamaError, Params, RopeScaling, count
from lovely_llama_tools.files import default_model, load
from lovely_llama_tools.formats import Model

# ---- Reading ---------------------------------------------------------------------------------------------------------


def leaves(params: Params) -> dict[str, Any]:
    """Parameters under their names in a GGUF, spelt out independently of the loader."""
    named = {"token_embd": params.embed, "output_norm": params.norm}
    for i, block in enumerate(layers_of(params)):
        named |= {
            f"blk.{i}.attn_norm": block.attn_norm,
            f"blk.{i}.attn_q": block.attn.q,
            f"blk.{i}.attn_k": block.attn.k,
            f"blk.{i}.attn_v": block.attn.v,
            f"blk.{i}.attn_output": block.attn.o,
            f"blk.{i}.ffn_norm": block.ffn_norm,
            f"blk.{i}.ffn_gate": block.ffn.gate,
            f"blk.{i}.ffn_up": block.ffn.up,
            f"blk.{i}.ffn_down": block.ffn.down,
        }
    if params.unembed is not None:
        named["output"] = params.unembed
    return {f"{name}.weight": leaf for name, leaf in named.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_read_as_it_was_written(tmp_path: Path, tied: bool) -> None:
    config = replace(TINY, tied=tied, theta=5e5, eps=1e-6)
    arrays = tiny_arrays(config)
    model = load(write_gguf(tmp_path / "a.gguf", tiny_fields(config), arrays))
    assert model.config == config
    found = leaves(model.params)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]).ravel(), array.ravel(), name)
    assert tokenizer_of(model).decode(tokenizer_of(model).encode("the théâtre\n", False)) == "the théâtre\n"


def test_a_quantised_gguf_is_read_as_by_the_gguf_package(tmp_path: Path) -> None:
    arrays = tiny_arrays()
    quantised = [name for name, array in arrays.items() if array.shape[-1] % 32 == 0]
    assert len(quantised) > 10
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), arrays, quantised)
    found = leaves(load(path).params)
    for tensor in gguf.GGUFReader(path).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(np.asarray(found[tensor.name]).ravel(), want.ravel(), tensor.name)


def with_frequencies(config: Config, factors: "np.ndarray[Any, Any]", **scaling: Any) -> dict[str, Any]:
    return {"fields": tiny_fields(config) | {f"llama.rope.scaling.{name}": value for name, value in scaling.items()},
            "arrays": tiny_arrays(config) | {"rope_freqs.weight": factors.astype(np.float32)}}  # fmt: skip


def test_what_says_the_same_twice_is_read(tmp_path: Path) -> None:
    """Widths of keys and values that are those of a head, and factors of frequencies that are those of the scaling."""
    fields = tiny_fields() | {"llama.attention.key_length": 8, "llama.attention.value_length": 8}
    assert load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).config == TINY
    for factors, scaling in ((np.ones(4), {}), (np.full(4, 2.0), {"type": "linear", "factor": 2.0})):
        model = load(write_gguf(tmp_path / "a.gguf", **with_frequencies(TINY, factors, **scaling)))
        assert (model.config.rope_scaling is None) == (not scaling)
    for factors, scaling in ((np.full(4, 8.0), {}), (np.ones(4), {"type": "linear", "factor": 2.0})):
        with pytest.raises(LlamaError) as caught:
            load(write_gguf(tmp_path / "a.gguf", **with_frequencies(TINY, factors, **scaling)))
        assert caught.value.field == "rope_freqs.weight"


def test_templates_with_loop_controls_are_read(tmp_path: Path) -> None:
    fields = tiny_fields() | {"tokenizer.chat_template": "{% for m in messages %}{% break %}{% endfor %}"}
    assert "break" in (tokenizer_of(load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays()))).template or "")


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            RopeScaling("yarn", 4.0, 32, 1.0, 32.0, 0.1 * math.log(4) + 1),
        ),
    ],
)
def test_a_rope_scaling_is_read(tmp_path: Path, scaling: dict[str, Any], want: RopeScaling | None) -> None:
    fields = tiny_fields() | {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    assert load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).config.rope_scaling == want


# ---- Refusals --------------------------------------------------------------------------------------------------------

Change = Callable[[File], File]
EMBED, DOWN, KV_HEADS = "token_embd.weight", "blk.1.ffn_down.weight", "llama.attention.head_count_kv"


def field(name: str | bytes, value: Any) -> Change:
    """Change a field, or add one."""
    return lambda f: f._replace(fields=(*(pair for pair in f.fields if pair[0] != name), (name, value)))


def no_field(name: str) -> Change:
    return lambda f: f._replace(fields=tuple(pair for pair in f.fields if pair[0] != name))


def part(**parts: Any) -> Change:
    return lambda f: f._replace(**parts)


def tensor(which: str, **parts: Any) -> Change:
    return lambda f: f._replace(tensors=tuple(t._replace(**parts) if t.name == which else t for t in f.tensors))


def shifted(by: int) -> Change:
    """Move all tensors by this many bytes, in the header and in the data."""
    return lambda f: f._replace(
        tensors=tuple(t._replace(offset=t.offset + by) for t in f.tensors), data=bytes(by) + f.data
    )


def number(array: str, value: float) -> Change:
    """Change the first number of a tensor."""

    def change(f: File) -> File:
        at = next(t.offset for t in f.tensors if t.name == array)
        return f._replace(data=f.data[:at] + struct.pack("<f", value) + f.data[at + 4 :])

    return change


def item(name: str, i: int, value: Any) -> Change:
    """Change an item of an array."""

    def change(f: File) -> File:
        items = list(dict(f.fields)[name])
        items[i] = value
        return field(name, items)(f)

    return change


def array_header(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, count)


LENGTHS = (2**30, 2**40, 2**63, 2**64 - 1)
WORD, EPS = "tokenizer.ggml.", "llama.attention.layer_norm_rms_epsilon"
KINDS = ("tokens", "token_type", "merges")
LISTS = [f"{WORD}{name}" for name in KINDS]
REFUSED: dict[str, tuple[Change, str]] = {
    "magic": (part(magic=b"GGUX"), "n_heads"),
    "magic, big-endian": (part(magic=b"FUGG"), "contents"),
    **{f"version {n}": (part(version=n), "version") for n in (0, 1, 4, 99, 0x03000000)},
    **{f"{n} tensors": (part(counts=(n, 5)), "counts") for n in LENGTHS},
    **{f"{n} fields": (part(counts=(1, n)), "counts") for n in LENGTHS},
    **{f"string of {n}": (field("x", struct.pack("<IQ", 8, n)), "size") for n in LENGTHS},
    **{f"array of {n} {k}": (field("x", array_header(k, n)), "x") for n in LENGTHS for k in (0, 4, 7, 8, 12)},
    "array of more strings than the file holds": (field("x", array_header(8, 500)), "size"),
    "arrays, 5000 deep": (field("x", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "x"),
    "array of arrays": (field("x", array_header(9, 1) + struct.pack("<IQ", 4, 0)), "x"),
    "array of 2^62 empty arrays": (field("x", array_header(9, 2**62)), "x"),
    **{f"field of type {n}": (field("x", struct.pack("<IQ", n, 0)), "x") for n in (13, 99, 2**31)},
    "key not UTF-8": (field(b"\xff\xfe", 1), "string"),
    "value not UTF-8": (field("x", struct.pack("<I", 8) + text(b"\xff")), "string"),
    "duplicate key": (lambda f: f._replace(fields=(*f.fields, f.fields[3])), "llama.embedding_length"),
    "duplicate tensor": (lambda f: f._replace(tensors=(*f.tensors, f.tensors[2])), "blk.0.attn_q.weight"),
    **{f"alignment {n}": (field("general.alignment", n), "general.alignment") for n in (0, 1, 3, 2**31, 32.0, "32")},
    "alignment in an array": (field("general.alignment", [32]), "general.alignment"),
    "no axes": (tensor(DOWN, shape=()), DOWN),
    "five axes": (tensor(DOWN, shape=(24, 32, 1, 1, 1)), DOWN),
    "an empty axis": (tensor(DOWN, shape=(24, 0)), DOWN),
    "axes swapped": (tensor(DOWN, shape=(32, 24)), DOWN),
    "a product beyond 64 bits": (tensor(DOWN, shape=(2**32, 2**32)), DOWN),
    "a long vocabulary": (tensor(EMBED, shape=(32, 2**40)), "vocab"),
    **{f"tensor of type {n}": (tensor(DOWN, kind=n), DOWN) for n in (4, 5, 99, 2**32 - 1)},
    "integer weights": (tensor(DOWN, kind=26), DOWN),
    "rows that are not a multiple of a block": (tensor(DOWN, kind=8), DOWN),
    **{f"offset {n}": (tensor(DOWN, offset=n), DOWN) for n in (2**64 - 32, 2**63, 2**40, 10**6)},
    **{f"all tensors moved by {n}": (shifted(n), EMBED) for n in (1, 4, 16)},
    "two tensors at one offset": (tensor(DOWN, offset=0), "tensors"),
    "overlapping tensors": (lambda f: tensor(DOWN, offset=f.tensors[3].offset - 32)(f), "tensors"),
    "a tensor missing": (lambda f: f._replace(tensors=f.tensors[:-1]), "tensors"),
    "no embedding": (tensor(EMBED, name="embd.weight"), EMBED),
    "an unexpected tensor": (tensor("output_norm.weight", name="blk.0.attn_q.bias"), "tensors"),
    "NaN": (number(DOWN, math.nan), DOWN),
    "infinity": (number(EMBED, -math.inf), EMBED),
    **{f"no {name}": (no_field(name), name) for name in tiny_fields() if name not in (
        "llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token",
        "tokenizer.chat_template",
    )},
    "no architecture": (no_field("general.architecture"), "general.architecture"),
    "another architecture": (field("general.architecture", "qwen2"), "general.architecture"),
    **{
        f"{name} as {value!r}": (field(f"llama.{name}", value), f"llama.{name}")
        for name in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
        for value in (2.0, "2", True, [2, 2])
    },
    "eps as an integer": (field(EPS, 1), EPS),
    **{f"eps {x}": (field(EPS, x), "eps") for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"theta {x}": (field("llama.rope.freq_base", x), "theta") for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"{n} layers": (field("llama.block_count", n), "layers") for n in (0, 2**32 - 1)},
    **{f"{n} layers": (field("llama.block_count", n), "tensors") for n in (1, 3)},
    "more layers than tensors": (field("llama.block_count", 21), "llama.block_count"),
    **{f"{n} heads": (field("llama.attention.head_count", n), "llama.attention.head_count") for n in (0, 5, 64)},
    **{f"{n} heads": (field("llama.attention.head_count", n), "llama.rope.dimension_count") for n in (2, 32)},
    **{f"{n} key/value heads": (field(KV_HEADS, n), KV_HEADS) for n in (0, 3, 8)},
    **{f"{n} key/value heads": (field(KV_HEADS, n), "blk.0.attn_k.weight") for n in (1, 4)},
    "a rotation of part of a head": (field("llama.rope.dimension_count", 4), "llama.rope.dimension_count"),
    "an unknown scaling": (field("llama.rope.scaling.type", "longrope"), "rope_scaling.rope_type"),
    "another vocabulary": (field("llama.vocab_size", TINY.vocab + 1), "llama.vocab_size"),
    # Unknown fields could change what has to be computed: they are refused by name, not ignored.
    **{f"an unknown {name}": (field(f"llama.{name}", value), f"llama.{name}") for name, value in {
        "rope.scale_linear": 4.0, "rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0,
        "attention.sliding_window": 16, "attention.value_length": 4, "logit_scale": 2.0, "expert_count": 8,
    }.items()},
    "no context": (field("llama.context_length", 0), "ctx"),
    "another tokenizer": (field(f"{WORD}model", "llama"), f"{WORD}model"),
    "another pre-tokenizer": (field(f"{WORD}pre", "llama-bpe"), f"{WORD}pre"),
    "too few pieces": (field(f"{WORD}tokens", TOKENS[:-1]), f"{WORD}tokens"),
    "a duplicate piece": (item(f"{WORD}tokens", 9, TOKENS[8]), f"{WORD}tokens"),
    "pieces as numbers": (field(f"{WORD}tokens", list(range(TINY.vocab))), f"{WORD}tokens"),
    "pieces as one string": (field(f"{WORD}tokens", "a" * TINY.vocab), f"{WORD}tokens"),
    "a piece of letters that stand for no bytes": (item(f"{WORD}tokens", 9, "日"), f"{WORD}tokens"),
    "too few token types": (field(f"{WORD}token_type", [1] * 9), f"{WORD}token_type"),
    "an unknown token type": (item(f"{WORD}token_type", 9, 77), f"{WORD}token_type"),
    "token types as strings": (field(f"{WORD}token_type", ["1"] * TINY.vocab), f"{WORD}token_type"),
    "merges as numbers": (field(f"{WORD}merges", [1, 2]), f"{WORD}merges"),
    "a merge of one piece": (item(f"{WORD}merges", 0, "Ġt"), f"{WORD}merges"),
    "a merge of three pieces": (item(f"{WORD}merges", 0, "Ġ t h"), f"{WORD}merges"),
    "a merge of unknown pieces": (item(f"{WORD}merges", 0, "日 本"), f"{WORD}merges"),
    "a merge into an unknown piece": (item(f"{WORD}merges", 0, "a b"), f"{WORD}merges"),
    **{f"{name} as a number": (field(f"{WORD}{name}", 5), f"{WORD}{name}") for name in KINDS},
    "bos −1": (field(f"{WORD}bos_token_id", struct.pack("<Ii", 5, -1)), f"{WORD}bos_token_id"),
    "eos −1": (field(f"{WORD}eos_token_id", struct.pack("<Ii", 5, -1)), f"{WORD}eos_token_id"),
    "a line in a name": (field("llama.rope\nscale", 1), "llama.rope\nscale"),
    "bos out of range": (field(f"{WORD}bos_token_id", TINY.vocab), f"{WORD}bos_token_id"),
    "eos out of range": (field(f"{WORD}eos_token_id", 2**32 - 1), f"{WORD}eos_token_id"),
    "eos as a string": (field(f"{WORD}eos_token_id", "2"), f"{WORD}eos_token_id"),
    "add_bos without a bos": (
        lambda f: no_field(f"{WORD}bos_token_id")(field(f"{WORD}add_bos_token", True)(f)),
        f"{WORD}bos_token_id",
    ),
    "add_bos as a number": (field(f"{WORD}add_bos_token", 1), f"{WORD}add_bos_token"),
    "a template as a number": (field("tokenizer.chat_template", 5), "tokenizer.chat_template"),
    "an invalid template": (field("tokenizer.chat_template", "{% for %}"), "tokenizer.chat_template"),
}  # fmt: skip


def test_a_handmade_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    want = load(write_gguf(path, tiny_fields(), tiny_arrays()))
    for change in (part(), part(version=2), field("x", 5), field("x", ["a", "b"]), shifted(32), no_field("x")):
        path.write_bytes(change(tiny_file()).pack())
        got = load(path)
        assert got.config == want.config
        assert_close(got.params, want.params, 0, "params")


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_ggufs_are_refused(tmp_path: Path, name: str) -> None:
    change, field = REFUSED[name]
    assert_refused(tmp_path / "a.gguf", change(tiny_file()).pack(), field)


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    """Cut in the fixed part of the header, below the minimum size for its counts, in its lists, and in the data."""
    file, path = tiny_file(), tmp_path / "a.gguf"
    data, least = file.pack(), 32 * len(file.tensors) + 13 * len(file.fields)
    head = len(data) - len(file.data)
    for cut in (*range(4, 40, 5), *range(40, head - 32, 577), head - 32):
        assert_refused(path, data[:cut], *(["counts"] if 24 <= cut < least else ["size", *LISTS]))
    ends = {tensor.name: head + tensor.offset + 4 * math.prod(tensor.shape) for tensor in file.tensors}
    for cut in (head - 1, head, head + 1, len(data) - 32, len(data) - 1):
        assert_refused(path, data[:cut], next(name for name, end in ends.items() if end > cut))


def test_a_quantised_block_with_a_nan_scale_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_arrays(), [EMBED])
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == EMBED)
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(math.nan).tobytes()
    assert_refused(path, bytes(data), EMBED)


def test_quantised_gains_are_read(tmp_path: Path) -> None:
    file, zeros = tiny_file(), bytes(34)
    changed = tensor("output_norm.weight", kind=8, offset=len(file.data))(file._replace(data=file.data + zeros))
    (tmp_path / "a.gguf").write_bytes(changed.pack())
    assert not np.asarray(load(tmp_path / "a.gguf").params.norm).any()


# ---- A real file -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return load(default_model())


def test_smollm2_has_the_published_config(smollm2: Model) -> None:
    assert smollm2.config == CONFIGS["smollm2-135m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == count(smollm2.config) == 134_515_008
    assert {leaf.dtype.name for leaf in jax.tree.leaves(smollm2.params)} == {"float32"}
    assert tokenizer_of(smollm2).stops == {
        tokenizer_of(smollm2).specials[name] for name in ("<|im_end|>", "<|endoftext|>")
    }


def test_smollm2_has_the_weights_of_the_gguf_package(smollm2: Model) -> None:
    names = [
        EMBED,
        "blk.0.attn_norm.weight",
        "blk.3.attn_q.weight",
        "blk.17.attn_k.weight",
        "blk.29.attn_output.weight",
    ]
    names += ["blk.29.ffn_down.weight", "blk.8.ffn_gate.weight", "output_norm.weight"]
    found, seen = leaves(smollm2.params), set[str]()
    for tensor in gguf.GGUFReader(default_model()).tensors:
        if tensor.name in names:
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(np.asarray(found[tensor.name]).ravel(), want.ravel(), tensor.name)
            seen.add(str(tensor.tensor_type))
    assert len(seen) == 3
