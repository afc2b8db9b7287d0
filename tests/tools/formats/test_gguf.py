"""GGUF: files are read bit for bit as they were written, and written so that other programs read them."""

import logging
import math
import os
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from asserts import assert_close, assert_refused
from builders import (
    TINY,
    TOKENS,
    layers_of,
    random_params,
    tiny_arrays,
    tiny_fields,
    tiny_file,
    tokenizer_of,
    write_gguf,
)  # fmt: skip
from jax import numpy as jnp
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lovely_llama import CONFIGS, Config, LlamaError, Params, RopeScaling, Sampling, count, logits, rope_frequencies
from lovely_llama_tools.formats.files import checkpoint, default_model, load, save
from lovely_llama_tools.formats.gguf import config_fields
from lovely_llama_tools.formats.gguf_header import KINDS
from lovely_llama_tools.formats.model import Model

EMBED = "token_embd.weight"

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


def with_array(path: Path, kind: int, count: int, size: int) -> Path:
    """A small GGUF with an array of so many zeros of a type, which take so many bytes, and none on the disk."""
    data = tiny_file()._replace(fields=(*tiny_file().fields, ("x", struct.pack("<IIQ", 9, kind, count)))).pack()
    end = data.index(struct.pack("<IIQ", 9, kind, count)) + 16
    assert size % 32 == 0  # so that the tensors stay aligned
    with path.open("wb") as file:
        file.write(data[:end])
        file.seek(size, os.SEEK_CUR)
        file.write(data[end:])
    return path


@pytest.mark.parametrize(("kind", "width"), [(0, 1), (3, 2), (4, 4), (6, 4), (7, 1), (10, 8), (12, 8)])
def test_an_array_of_numbers_takes_the_memory_that_it_takes_in_the_file(tmp_path: Path, kind: int, width: int) -> None:
    path = with_array(tmp_path / "a.gguf", kind, 2**25 // width, 2**25)
    tracemalloc.start()
    with checkpoint(path) as found:
        assert len(found.fields["x"][0]) == 2**25 // width
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 2**25


@pytest.mark.parametrize("count", [2**23, 2**62])
def test_more_text_than_a_header_has_is_refused(tmp_path: Path, count: int) -> None:
    path = with_array(tmp_path / "a.gguf", 8, count, 2**26)
    tracemalloc.start()
    with pytest.raises(LlamaError) as caught:
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.field == ("strings" if count == 2**23 else "x")
    assert peak < 2**26


@pytest.mark.parametrize(("kind", "name"), [(9, "9, Q8_1"), (16, "16, IQ2_XXS"), (39, "39, MXFP4"), (4, "4")])
def test_a_type_that_is_not_read_has_a_name(tmp_path: Path, kind: int, name: str) -> None:
    file = tiny_file()
    (tmp_path / "a.gguf").write_bytes(file._replace(tensors=(file.tensors[0]._replace(kind=kind),)).pack())
    with pytest.raises(LlamaError, match=rf"got unsupported type {name}, expected F32, F16, .*Q4_K"):
        load(tmp_path / "a.gguf")


# Rows of 256, the largest block there is, but for those of `o`.
BLOCKS = Config(len(TOKENS), 256, 1, 2, 3, 8, 512, 64, 1e-5, 1e4, None, True)
KIND_NAMES = [kind.name for kind in KINDS.values()]


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_quantised_gguf_is_read_as_by_the_gguf_package(tmp_path: Path, kind: str) -> None:
    arrays, block = tiny_arrays(BLOCKS), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    quantised = [name for name, array in arrays.items() if array.shape[-1] % block == 0]
    assert len(quantised) > 7
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(BLOCKS), arrays, quantised, kind)
    found = leaves(load(path).params)
    for tensor in gguf.GGUFReader(path).tensors:
        assert (tensor.tensor_type.name == kind) == (tensor.name in quantised or kind == "F32")
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(np.asarray(found[tensor.name]).ravel(), want.ravel(), tensor.name)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_halves_are_loaded_bit_for_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    arrays = tiny_arrays(BLOCKS)
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(BLOCKS), arrays, arrays, kind)
    with checkpoint(path) as found:
        assert found.dtype() == dtype == found.get(EMBED).dtype.name
        loaded = leaves(found.load(dtype).params)
    for tensor in gguf.GGUFReader(path).tensors:
        got = np.asarray(loaded[tensor.name])
        assert got.dtype.name == dtype
        assert got.tobytes() == tensor.data.tobytes(), tensor.name


def test_blocks_have_the_sizes_of_the_gguf_package() -> None:
    for number, kind in KINDS.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (kind.name, (kind.block, kind.width)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])


def test_split_files_are_read_by_any_part(tmp_path: Path) -> None:
    want = load(write_gguf(tmp_path / "whole.gguf", tiny_fields(), tiny_arrays()))
    write_gguf(tmp_path / "tiny.gguf", tiny_fields(), tiny_arrays(), split=8)
    parts = sorted(tmp_path.glob("tiny-*"))
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        model = load(part)
        assert model.config == want.config
        assert_close(model.params, want.params, 0, "params")
        assert tokenizer_of(model).pieces == tokenizer_of(want).pieces


def test_a_model_may_have_no_tokenizer(tmp_path: Path) -> None:
    fields = {name: value for name, value in tiny_fields().items() if not name.startswith("tokenizer.")}
    assert load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).tokenizer is None


def test_tokens_that_end_turns_and_messages_are_stops(tmp_path: Path) -> None:
    fields = tiny_fields() | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    assert tokenizer_of(load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays()))).stops == {0, 2, 7, 9}


def test_fields_are_told_apart(tmp_path: Path) -> None:
    """Those that are used, those that are taken for granted, and those that do not change the mathematics."""
    neutral = {"llama.expert_count": 0, "llama.attention.causal": True, "llama.rope.scaling.finetuned": True}
    extra = {"general.name": "tiny", "general.sampling.mirostat": 1, "llama.vocab_size": TINY.vocab, **neutral}
    fields = {name: value for name, value in tiny_fields().items() if name != "llama.rope.freq_base"}
    with checkpoint(write_gguf(tmp_path / "a.gguf", fields | extra, tiny_arrays())) as found:
        told = {name: how for name, (_, how) in found.fields.items()}
        assert found.fields["llama.rope.freq_base"] == (1e4, "defaulted")
        assert found.fields["llama.block_count"] == (TINY.layers, "honoured")
    assert {name for name, how in told.items() if how == "ignored"} == {
        "general.name", "general.sampling.mirostat", *neutral}  # fmt: skip
    assert {name for name, how in told.items() if how == "defaulted"} == {
        "general.type", "llama.rope.freq_base", "llama.attention.key_length", "llama.attention.value_length"
    }  # fmt: skip
    assert told.keys() > {*fields, *extra}


def test_a_name_with_a_newline_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_fields() | {"llama.rope\nscale": 1}, tiny_arrays())
    assert_refused(path, path.read_bytes(), "llama.rope\nscale")


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    stated = {"temp": 0.8, "top_k": 40, "top_p": 1.0, "penalty_repeat": 1.1}
    fields = tiny_fields() | {f"general.sampling.{name}": value for name, value in stated.items()}
    sampling = load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).sampling
    assert sampling == Sampling(repetition_penalty=1.1, temperature=0.8, top_k=40, top_p=None)
    assert load(write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_arrays())).sampling is None


def test_templates_with_loop_controls_are_read(tmp_path: Path) -> None:
    fields = tiny_fields() | {"tokenizer.chat_template": "{% for m in messages %}{% break %}{% endfor %}"}
    assert "break" in (tokenizer_of(load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays()))).template or "")


# ---- Rotary scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        ({"type": "none", "factor": 2.0}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"factor": 2.0}, RopeScaling("linear", 2.0)),  # llama.cpp's default type
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            RopeScaling("yarn", 4.0, 32, 1.0, 32.0, 0.1 * math.log(4) + 1),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.25},
            RopeScaling("yarn", 4.0, 32, 1.0, 32.0, 1.423287),
        ),
    ],
)
def test_a_rope_scaling_is_read(tmp_path: Path, scaling: dict[str, Any], want: RopeScaling | None) -> None:
    fields = tiny_fields() | {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    assert load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).config.rope_scaling == want


# Meta's; one whose numbers are not round; with one pair that is slowed in part; and with none.
LLAMA3 = {
    "llama-3.1-8b": (128, 5e5, CONFIGS["llama-3.1-8b"].rope_scaling),
    "llama-3.2-1b": (64, 5e5, CONFIGS["llama-3.2-1b"].rope_scaling),
    "not round": (96, 2e4, RopeScaling("llama3", 5.5, 1000, 1.5, 9.0)),
    "one between": (10, 700.0, RopeScaling("llama3", 3.0, 40, 1.0, 4.0)),
    "none between": (4, 1e4, RopeScaling("llama3", 4.0, 77, 1.0, 4.0)),
}


def stated(scaling: RopeScaling, theta: float) -> dict[str, Any]:
    """A scaling as transformers has it."""
    stated: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind != "linear":
        stated["original_max_position_embeddings"] = scaling.original_ctx
    if scaling.kind == "llama3":
        stated |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    return stated | ({"attention_factor": scaling.attention_factor} if scaling.kind == "yarn" else {})


def factors_in_transformers(head_dim: int, theta: float, scaling: RopeScaling) -> "np.ndarray[Any, Any]":
    """By what transformers divides the frequencies: what llama.cpp's converter stores."""
    rope = stated(scaling, theta)
    frequencies = [
        LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters)).inv_freq.numpy()
        for parameters in ({"rope_type": "default", "rope_theta": theta}, rope)
    ]
    return frequencies[0] / frequencies[1]


@pytest.mark.parametrize("name", LLAMA3)
def test_a_scaling_of_llama3_is_read_from_its_factors(tmp_path: Path, name: str) -> None:
    head_dim, theta, scaling = LLAMA3[name]
    assert scaling
    config = replace(TINY, head_dim=head_dim, theta=theta)
    factors = factors_in_transformers(head_dim, theta, scaling)
    assert (factors > 1.001).any()
    arrays = tiny_arrays(config) | {"rope_freqs.weight": factors.astype(np.float32)}
    found = load(write_gguf(tmp_path / "a.gguf", tiny_fields(config), arrays)).config
    assert found.rope_scaling == scaling or not name.startswith("llama")
    want = rope_frequencies(replace(config, rope_scaling=scaling))
    np.testing.assert_allclose(rope_frequencies(found), want, rtol=1e-5)


# ---- Writing ---------------------------------------------------------------------------------------------------------

# 6 query heads over 2 of keys and values, with a width that is not dim / 6, for wrong permutations to show.
GROUPED = Config(len(TOKENS), 96, 2, 2, 3, 10, 64, 64, 1e-6, 5e5, None, False)
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 2.5),
    "llama3": RopeScaling("llama3", 3.0, 40, 2.0, 8.0),
    "yarn": RopeScaling("yarn", 4.0, 16, 1.0, 32.0, 0.1 * math.log(4) + 1),
    "yarn, sharper": RopeScaling("yarn", 4.0, 16, 1.0, 32.0, 1.3),
}


def saved(tmp_path: Path, config: Config, dtype: str = "float32", **more: Any) -> tuple[Model, Path]:
    model = Model(config, random_params(config), None)._replace(**more)
    save(model, path := tmp_path / "a.gguf", dtype=dtype, force=True)
    return model, path


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_file_is_read_the_same(tmp_path: Path, scaling: str, tied: bool) -> None:
    sampling = Sampling(1.1, None, 7, 0.9, None)
    config = replace(GROUPED, vocab=len(TOKENS), tied=tied, rope_scaling=SCALINGS[scaling])
    tokenizer = tokenizer_of(load(write_gguf(tmp_path / "b.gguf", tiny_fields(), tiny_arrays())))
    model, path = saved(tmp_path, config, tokenizer=tokenizer._replace(sampling=sampling))
    found = load(path)
    assert (found.config, found.sampling) == (config, sampling)
    assert_close(found.params, model.params, 0, "params")


def test_a_tokenizer_is_written(tmp_path: Path) -> None:
    """transformers has the same ids from the file; and a larger vocabulary is filled with tokens that add nothing."""
    config = replace(GROUPED, vocab=len(TOKENS) + 5)
    want = tokenizer_of(load(write_gguf(tmp_path / "b.gguf", tiny_fields(), tiny_arrays())))
    _, path = saved(tmp_path, config, tokenizer=want)
    got = tokenizer_of(load(path))
    assert got.pieces == [*want.pieces, *[b""] * 5]
    assert got._replace(encode=want.encode, pieces=want.pieces) == want
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("the théâtre\n", "  12 345", "<|im_end|>", ""):
        ids = want.encode(text, True)
        assert got.encode(text, True) == ids == theirs.encode(text, add_special_tokens=False), text


def test_published_configs_can_be_written() -> None:
    for config in CONFIGS.values():
        assert config_fields(config)["llama.rope.freq_base"] == config.theta


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_written_rounded(tmp_path: Path, dtype: str) -> None:
    model, path = saved(tmp_path, GROUPED, dtype)
    want = jax.tree.map(lambda w: w if w.ndim == 1 else w.astype(dtype).astype(jnp.float32), model.params)
    assert_close(load(path).params, want, 0, "params")


def test_q8_0_is_written_within_its_error(tmp_path: Path) -> None:
    """Half a step of the largest number of a block / 127, and the rounding of that step to float16."""
    model, path = saved(tmp_path, BLOCKS, "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_output.weight"] == "F16"  # of rows of 48, which do not make blocks of 32
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert [*kinds.values()].count("Q8_0") == 7
    found, want = leaves(load(path).params), leaves(model.params)
    for name in (name for name, kind in kinds.items() if kind == "Q8_0"):
        got, exact = (np.asarray(tree[name]).reshape(-1, 32) for tree in (found, want))
        largest = abs(exact).max(axis=1, keepdims=True)
        error = abs(got - exact)
        assert (error <= largest * (0.5 / 127 + 2**-11)).all(), name
        assert error.max() > largest.min() / 1000


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    model, path = saved(tmp_path, replace(BLOCKS, rope_scaling=SCALINGS["llama3"]), dtype)
    reader = gguf.GGUFReader(path)
    factors = factors_in_transformers(8, BLOCKS.theta, RopeScaling("llama3", 3.0, 40, 2.0, 8.0))
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    np.testing.assert_allclose(tensors.pop("rope_freqs.weight"), factors, rtol=1e-6)
    want = leaves(model.params)
    assert tensors.keys() == want.keys()
    for name, array in want.items():
        rows = np.asarray(array).reshape(tensors[name].shape)
        np.testing.assert_allclose(tensors[name], rows, atol=0 if dtype == "float32" else 0.02, err_msg=name)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == {
        "float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }[dtype]  # fmt: skip
    assert not [name for name in fields if name.startswith("llama.rope.scaling")]  # llama.cpp would apply them too


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """It logs to a stream that pytest has replaced."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("scaling", "tied"), [("none", True), *((scaling, False) for scaling in SCALINGS)])
def test_transformers_has_our_logits_from_what_is_written(tmp_path: Path, scaling: str, tied: bool) -> None:
    """transformers ignores the scalings of a GGUF, so it is told them."""
    config = replace(GROUPED, tied=tied, rope_scaling=SCALINGS[scaling])
    model, path = saved(tmp_path, config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    read = theirs.config
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (6, 2, 10)
    assert (read.rms_norm_eps, read.tie_word_embeddings) == (np.float32(1e-6), tied)
    assert read.rope_parameters["rope_theta"] == 5e5
    if config.rope_scaling:
        rotated: Any = read.to_dict() | {"rope_parameters": stated(config.rope_scaling, config.theta)}
        theirs.model.rotary_emb = LlamaRotaryEmbedding(LlamaConfig(**rotated))
    tokens = np.random.default_rng(0).integers(0, config.vocab, 64)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)[None]).logits[0].numpy()
    assert_close(logits(model.params, jnp.asarray(tokens, jnp.int32), config), want, 1e-5, "logits")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (replace(TINY, theta=1e4 + 1 / 3), "llama.rope.freq_base"),
        (replace(TINY, eps=1 / 3e5), "llama.attention.layer_norm_rms_epsilon"),
        (replace(TINY, rope_scaling=RopeScaling("linear", 10 / 3)), "llama.rope.scaling.factor"),
        (replace(TINY, rope_scaling=RopeScaling("llama3", 2.0, 32, 1.0, 10 / 3)), "lovely_llama.rope.scaling.high"),
        (replace(TINY, rope_scaling=RopeScaling("yarn", 2.0, 32, 1.0, 16.0, 1.0)), "rope_scaling"),
        (replace(TINY, rope_scaling=RopeScaling("yarn", 2.0, 32, 1.0, 32.0, 4 / 3)), "rope_scaling.attention_factor"),
    ],
)
def test_what_a_gguf_cannot_carry_is_refused(tmp_path: Path, config: Config, field: str) -> None:
    with pytest.raises(LlamaError) as caught:
        saved(tmp_path, config)
    assert caught.value.field == field
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 7e4), ("q8_0", 1e7), ("float32", math.nan), ("q8_0", -math.inf)]
)
def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    params = random_params(TINY)
    params = params._replace(embed=params.embed.at[3, 5].set(value))
    with pytest.raises(LlamaError) as caught:
        saved(tmp_path, TINY, dtype, params=params)
    assert caught.value.field == EMBED
    assert not list(tmp_path.iterdir())


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
