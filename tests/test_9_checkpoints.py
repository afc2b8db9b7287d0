"""Part 9, checkpoints: what is read is what was written, bit for bit; what no Llama has written is refused."""

import functools
import math
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
import pytest
import sentencepiece
from conftest import LLAMA2_C, SMALL, assert_close, random_params, read_recording
from jax import numpy as jnp

import lovely_llama as ll

Arrays = dict[str, "np.ndarray[tuple[int, ...], Any]"]

# ---- Names and layouts -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Callable[..., ll.Params], Callable[..., Any], Mapping[str, str]]] = {
    "llama2c": (ll.from_llama2c, ll.to_llama2c, ll.LLAMA2C),
    "hf": (ll.from_hf, ll.to_hf, ll.HF),
}


def random_arrays(names: Mapping[str, str], config: ll.Config, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in ll.all_tensors(names, config).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_from_and_to_are_inverse(layout: str, tied: bool) -> None:
    config = replace(SMALL, tied=tied)
    read, write, names = LAYOUTS[layout]
    params, arrays = random_params(config), random_arrays(names, config, 1)
    assert_close(read(write(params, config), config), params, 0, "params")
    assert_close(write(read(arrays, config), config), arrays, 0, "arrays")
    assert len(arrays) == 9 * config.layers + (2 if tied else 3)
    assert any("output" in name or "lm_head" in name for name in arrays) != tied


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_is_linear(layout: str) -> None:
    """So that it maps gradients as it maps parameters."""
    read, _, names = LAYOUTS[layout]
    a, b = (random_arrays(names, SMALL, seed) for seed in (1, 2))
    both = {name: 2 * a[name] - b[name] for name in a}
    want = jax.tree.map(lambda x, y: 2 * x - y, read(a, SMALL), read(b, SMALL))
    assert_close(read(both, SMALL), want, 0, "2a − b")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_changed_afterwards_change_nothing(layout: str) -> None:
    """At multiples of 64 bytes jax would read numpy's memory as it stands."""
    read, _, names = LAYOUTS[layout]
    arrays: Arrays = {}
    for name, array in random_arrays(names, SMALL, 1).items():
        memory = np.empty(array.nbytes + 64, np.uint8)
        memory = memory[-memory.ctypes.data % 64 :][: array.nbytes]
        arrays[name] = memory.view(array.dtype).reshape(array.shape)
        arrays[name][:] = array
    params = read(arrays, SMALL)
    before = jax.tree.map(np.array, params)
    for array in arrays.values():
        array[:] = 7
    assert_close(params, before, 0, "parameters")


def test_llama2c_is_a_reshape() -> None:
    arrays = random_arrays(ll.LLAMA2C, SMALL, 1)
    params = ll.from_llama2c(arrays, SMALL)
    for layer, block in enumerate(params.blocks):
        assert isinstance(block, ll.Block)
        named = {"wq": block.attn.q, "wk": block.attn.k, "wv": block.attn.v, "wo": block.attn.o}
        for name, leaf in named.items():
            want = arrays[f"layers.{layer}.attention.{name}.weight"]
            np.testing.assert_array_equal(np.asarray(leaf).ravel(), want.ravel())
        named = {"w1": block.ffn.gate, "w2": block.ffn.down, "w3": block.ffn.up}
        for name, leaf in named.items():
            np.testing.assert_array_equal(leaf, arrays[f"layers.{layer}.feed_forward.{name}.weight"])


def test_hugging_face_has_the_halves_of_pairs_apart() -> None:
    """Row i of a head there, in the first half, is row 2i here; i of the second half 2i + 1: by key/value head too."""
    arrays, half = random_arrays(ll.HF, SMALL, 1), SMALL.head_dim // 2
    block = ll.from_hf(arrays, SMALL).blocks[1]
    assert isinstance(block, ll.Block)
    q = arrays["model.layers.1.self_attn.q_proj.weight"].reshape(-1, SMALL.head_dim, SMALL.dim)
    k = arrays["model.layers.1.self_attn.k_proj.weight"].reshape(-1, SMALL.head_dim, SMALL.dim)
    for i in range(half):
        for head in range(SMALL.kv_heads):
            np.testing.assert_array_equal(block.attn.k[head, 2 * i : 2 * i + 2], k[head, [i, i + half]])
            for query in range(SMALL.q_per_kv):
                want = q[head * SMALL.q_per_kv + query, [i, i + half]]
                np.testing.assert_array_equal(block.attn.q[head, query, 2 * i : 2 * i + 2], want)
    v = arrays["model.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(block.attn.v, v.reshape(block.attn.v.shape))


# ---- Configs ---------------------------------------------------------------------------------------------------------

SIZES = ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx")


def changed(config: ll.Config, **fields: Any) -> ll.Config:
    """`replace`, for values of types that no Config may have."""
    config = replace(config)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    return config


@pytest.mark.parametrize("name", ll.CONFIGS)
def test_published_configs_are_configs(name: str) -> None:
    ll.check_config(ll.CONFIGS[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((size, value) for size in SIZES for value in (0, -2, 2**31, 4.0, "4", True)),
        ("head_dim", 7),
        *((name, value) for name in ("eps", "theta") for value in (0.0, -1e-5, math.nan, math.inf)),
        ("rope_scaling", ll.RopeScaling("dynamic", 2.0)),
        ("rope_scaling", ll.RopeScaling("linear", math.nan)),
        ("rope_scaling", ll.RopeScaling("linear", 0.0)),
        ("rope_scaling", ll.RopeScaling("llama3", 8.0, 0, 1.0, 4.0)),
        ("rope_scaling", ll.RopeScaling("llama3", 8.0, 8192, 4.0, 4.0)),
        ("rope_scaling", ll.RopeScaling("yarn", 8.0, 8192, 0.0, 32.0, 1.0)),
        ("rope_scaling", ll.RopeScaling("yarn", 8.0, 8192, 1.0, 32.0, math.nan)),
    ],
)
def test_what_is_no_config_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ll.LlamaError, match=rf"^somewhere: {field}.*: got .*, expected ") as caught:
        ll.check_config(changed(SMALL, **{field: value}), "somewhere")
    assert caught.value.file == "somewhere"
    assert caught.value.field.startswith(field)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("kind", "fields", "want"),
    [
        ("default", {}, None),
        ("default", {"rope_theta": 1e4}, None),
        ("linear", {"factor": 2.0}, ll.RopeScaling("linear", 2.0)),
        ("linear", {"factor": 3, "rope_theta": 1e4}, ll.RopeScaling("linear", 3.0)),
        ("llama3", LLAMA3, ll.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        ("yarn", YARN, ll.RopeScaling("yarn", 4.0, 4096, 1.0, 32.0, 0.1 * math.log(4) + 1)),
        (
            "yarn",
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
            ll.RopeScaling("yarn", 4.0, 4096, 2.0, 16.0, 1.5),
        ),
    ],
)
def test_scalings_are_understood(key: str, kind: str, fields: dict[str, Any], want: ll.RopeScaling | None) -> None:
    assert ll.rope_scaling({key: kind} | fields, "config.json") == want


def test_no_scaling_is_none() -> None:
    assert ll.rope_scaling({}, "config.json") is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": 5}, "5"),
        ({"rope_type": ["linear"], "factor": 2.0}, "linear"),
        ({"type": "linear", "factor": 2.0, "mscale": 1.0}, "mscale"),
        ({"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "default", "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": math.nan}, "factor"),
        ({"rope_type": "yarn", "factor": -4.0, "original_max_position_embeddings": 4096}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40.5}, "original_max"),
        *(
            ({"rope_type": "llama3"} | {name: value for name, value in LLAMA3.items() if name != missing}, missing)
            for missing in LLAMA3
        ),
    ],
)
def test_scalings_that_are_not_understood_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ll.LlamaError, match=rf"^config.json: rope_scaling.*{says}"):
        ll.rope_scaling(fields, "config.json")


def test_a_model_larger_than_memory_is_refused() -> None:
    ll.check_memory(ll.CONFIGS["smollm2-135m"], "a file")
    with pytest.raises(ll.LlamaError, match=r"^a file: memory: got .* GiB, expected 1511\.\d GiB"):
        ll.check_memory(ll.CONFIGS["llama-3.1-405b"], "a file")


def test_tensors_are_all_of_them_and_no_others() -> None:
    want = {"a": (2, 3), "b": (4,)}
    ll.check_tensors(want, dict(want), "a file")
    for found, says in (
        ({"a": (2, 3)}, "b"),
        (want | {"c": (1,)}, "c"),
        (want | {"a": (3, 2)}, r"\(3, 2\), expected \(2, 3\)"),
        ({"x": (2, 3), "b": (4,)}, "a"),
    ):
        with pytest.raises(ll.LlamaError, match=f"^a file: .*{says}"):
            ll.check_tensors(want, found, "a file")


# ---- llama2.c --------------------------------------------------------------------------------------------------------


def write_sentencepiece(path: Path, pieces: int) -> None:
    """A SentencePiece model of so many pieces."""
    text = ["the sky is blue", "the sea is blue too", "why is the sky so blue", "so it goes"] * 3
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=pieces, model_type="bpe", minloglevel=2
        )


@pytest.fixture(scope="module")
def llama2c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that upstream's export.py wrote, and a tokenizer that fits them."""
    folder = tmp_path_factory.mktemp("llama2c")
    for name in ("tied", "untied"):
        for version in range(3):
            shutil.copy(LLAMA2_C / f"{name}.v{version}.bin", folder)
    write_sentencepiece(folder / "tokenizer.model", 44)
    return folder


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_llama2c_file_gives_the_recorded_logits(llama2c: Path, name: str) -> None:
    model, recorded = ll.load(llama2c / f"{name}.v0.bin"), read_recording(f"{name}.bin")[0]
    assert model.config == ll.Config(80, 64, 2, 4, 2, 8, 128, 32, 1e-5, 1e4, None, name == "tied")
    assert model.tokenizer.pieces[44:] == [b""] * 36  # ids that the tokenizer has no piece for
    assert all(model.tokenizer.pieces[3:44])
    tokens, want = jnp.array(recorded["tokens"][0], jnp.int32), recorded["logits"][0]
    assert_close(ll.logits(model.params, tokens, model.config), want, 1e-5, "logits")


def header(**fields: int) -> Callable[[bytes], bytes]:
    """A change of the header's fields; the rest stays as it is."""
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")

    def change(data: bytes) -> bytes:
        values = dict(zip(names, struct.unpack("<7i", data[:28]), strict=True)) | fields
        return struct.pack("<7i", *values.values()) + data[28:]

    return change


def put(offset: int, value: float) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + struct.pack("<f", value) + data[offset + 4 :]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(((lambda data, n=n: data[:n]), "size") for n in (0, 1, 27, 28, 1000, -4, -1)),
        (lambda data: data + b"\0", "size"),
        (lambda data: data + b"\0\0\0\0", "size"),
        *((header(**{name: 0}), name) for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")),
        *((header(**{name: -8}), name) for name in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")),
        (header(vocab_size=0), "vocab_size"),
        (header(vocab_size=-(2**31)), "vocab_size"),
        (header(max_seq_len=0), "max_seq_len"),
        *((header(**{name: 2**31 - 1}), "") for name in ("dim", "hidden_dim", "n_layers", "max_seq_len")),
        (header(n_heads=5), "n_heads"),
        (header(n_heads=64), "head_dim"),
        (header(n_kv_heads=3), "n_kv_heads"),
        (header(n_kv_heads=16), "n_kv_heads"),
        (header(vocab_size=-80), "size"),
        (header(hidden_dim=127), "size"),
        (header(vocab_size=40), ""),
        (lambda data: b"PK\3\4" + data, "contents"),
        (lambda data: b"<!DOCTYPE html>" + data, "contents"),
        (lambda data: struct.pack("<Q", 40) + b'{"a": {"dtype": "F32", "shape": []}}' + data, ""),
        (put(28 + 4 * 100, math.nan), "tok_embeddings.weight"),
        (put(28 + 4 * 80 * 64, math.inf), "layers.0.attention_norm.weight"),
    ],
)
def test_what_is_no_llama2c_file_is_refused(
    llama2c: Path, tmp_path: Path, change: Callable[[bytes], bytes], field: str
) -> None:
    shutil.copy(llama2c / "tokenizer.model", tmp_path)
    refused(tmp_path / "model.bin", change((llama2c / "tied.v0.bin").read_bytes()), field)


@pytest.mark.parametrize("version", [1, 2])
def test_llama2c_versions_that_cannot_be_read_are_named(llama2c: Path, version: int) -> None:
    with pytest.raises(ll.LlamaError, match=r"llama2\.c version 1 or 2"):
        ll.load(llama2c / f"tied.v{version}.bin")


def test_a_vocab_of_the_wrong_sign_is_said(llama2c: Path, tmp_path: Path) -> None:
    data = header(vocab_size=80)((llama2c / "untied.v0.bin").read_bytes())
    assert "sign" in str(refused(tmp_path / "model.bin", data, "size"))


def test_a_tokenizer_must_be_there_and_fit(llama2c: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama2c / "tied.v0.bin", tmp_path))
    beside = tmp_path / "tokenizer.model"
    for contents in (None, b"", b"<html>", b"\x08\x01" * 50):
        if contents is not None:
            beside.write_bytes(contents)
        with pytest.raises(ll.LlamaError) as caught:
            ll.load(path)
        assert caught.value.file == str(beside)
    vocab = 40
    small = header(vocab_size=vocab)(path.read_bytes())
    path.write_bytes(small[: -4 * 64 * (80 - vocab)])
    write_sentencepiece(beside, 44)
    with pytest.raises(ll.LlamaError, match="got 44, expected at most 40"):
        ll.load(path)
    write_sentencepiece(beside, 40)
    assert ll.load(path).config.vocab == 40


# ---- GGUF ------------------------------------------------------------------------------------------------------------

# GPT-2's letters for bytes, in the order of the bytes: those that cannot be seen are moved up to U+0100 and on.
SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
LETTERS = [chr(b) if b in SEEN else chr(256 + UNSEEN.index(b)) for b in range(256)]
SPECIALS, MERGES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["Ġ t", "h e", "Ġt he", "Ã ©"]  # the last is é
TOKENS = [*SPECIALS, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = ll.Config(len(TOKENS), 32, 2, 2, 2, 8, 24, 64, 1e-5, 1e4, None, True)


def tiny_fields(config: ll.Config = TINY) -> dict[str, Any]:
    """What a GGUF says of a model besides its tensors."""
    return {
        "llama.block_count": config.layers,
        "llama.context_length": config.ctx,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.kv_heads * config.q_per_kv,
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


def tiny_arrays(config: ll.Config = TINY, seed: int = 0, scale: float = 0.3) -> Arrays:
    return {name: np.float32(scale) * array for name, array in random_arrays(ll.GGUF, config, seed).items()}


def write_talker(path: Path, says: str = "abcdefgh", ctx: int = 64) -> Path:
    """A model whose hidden states all lie on one side, and with them these letters: it says no others."""
    config = replace(TINY, tied=False, ctx=ctx)
    arrays, spoken = tiny_arrays(config), [TOKENS.index("Ã©" if letter == "é" else letter) for letter in says]
    arrays = {name: array / 5 if "blk" in name else array for name, array in arrays.items()}
    arrays["token_embd.weight"] += 1
    arrays["output_norm.weight"] = np.ones(config.dim, np.float32)
    arrays["output.weight"] -= 1
    noise = tiny_arrays(config, seed=1)["output.weight"][spoken]
    arrays["output.weight"][spoken] = 1 + 1.5 * (noise - noise.mean(axis=1, keepdims=True))
    return write_gguf(path, tiny_fields(config), arrays)


def write_gguf(path: Path, fields: Mapping[str, Any], arrays: Mapping[str, Any], quantised: Iterable[str] = ()) -> Path:
    """A GGUF as the gguf package writes it, some of its tensors as Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)  # what is mapped can be used where it lies, if nobody copies it
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
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaves(params: ll.Params) -> dict[str, Any]:
    """Parameters under their names in a GGUF, written out once more."""
    blocks = [block for block in params.blocks if isinstance(block, ll.Block)]
    named = {"token_embd": params.embed, "output_norm": params.norm}
    for i, block in enumerate(blocks):
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
    model = ll.load(write_gguf(tmp_path / "a.gguf", tiny_fields(config), arrays))
    assert model.config == config
    found = leaves(model.params)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]).ravel(), array.ravel(), name)
    assert model.tokenizer.decode(model.tokenizer.encode("the théâtre\n", False)) == "the théâtre\n"


def test_a_quantised_gguf_is_read_as_gguf_reads_it(tmp_path: Path) -> None:
    arrays = tiny_arrays()
    quantised = [name for name, array in arrays.items() if array.shape[-1] % 32 == 0]
    assert len(quantised) > 10
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), arrays, quantised)
    found = leaves(ll.load(path).params)
    for tensor in gguf.GGUFReader(path).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(np.asarray(found[tensor.name]).ravel(), want.ravel(), tensor.name)


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 2.0}, ll.RopeScaling("linear", 2.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            ll.RopeScaling("yarn", 4.0, 32, 1.0, 32.0, 0.1 * math.log(4) + 1),
        ),
    ],
)
def test_a_scaling_in_a_gguf_is_read(tmp_path: Path, scaling: dict[str, Any], want: ll.RopeScaling | None) -> None:
    fields = tiny_fields() | {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    assert ll.load(write_gguf(tmp_path / "a.gguf", fields, tiny_arrays())).config.rope_scaling == want


# What is wrong with a GGUF is made here by hand: the package would not write it.


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A field's value with its type before it. Bytes stand for themselves."""
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


Change = Callable[[File], File]
EMBED, DOWN = "token_embd.weight", "blk.1.ffn_down.weight"


def field(name: str | bytes, value: Any) -> Change:
    """Another value, or a field besides."""
    return lambda f: f._replace(fields=(*(pair for pair in f.fields if pair[0] != name), (name, value)))


def no_field(name: str) -> Change:
    return lambda f: f._replace(fields=tuple(pair for pair in f.fields if pair[0] != name))


def part(**parts: Any) -> Change:
    return lambda f: f._replace(**parts)


def tensor(which: str, **parts: Any) -> Change:
    return lambda f: f._replace(tensors=tuple(t._replace(**parts) if t.name == which else t for t in f.tensors))


def shifted(by: int) -> Change:
    """All tensors `by` bytes on, in the header as in the data."""
    return lambda f: f._replace(
        tensors=tuple(t._replace(offset=t.offset + by) for t in f.tensors), data=bytes(by) + f.data
    )


def number(array: str, value: float) -> Change:
    """Another first number in a tensor."""

    def change(f: File) -> File:
        at = next(t.offset for t in f.tensors if t.name == array)
        return f._replace(data=f.data[:at] + struct.pack("<f", value) + f.data[at + 4 :])

    return change


def item(name: str, i: int, value: Any) -> Change:
    """Another item in an array."""

    def change(f: File) -> File:
        items = list(dict(f.fields)[name])
        items[i] = value
        return field(name, items)(f)

    return change


def array_header(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, count)


LENGTHS = (2**30, 2**40, 2**63, 2**64 - 1)
WORD = "tokenizer.ggml."
REFUSED: dict[str, tuple[Change, str]] = {
    "magic": (part(magic=b"GGUX"), ""),
    "magic, big-endian": (part(magic=b"FUGG"), ""),
    **{f"version {n}": (part(version=n), "version") for n in (0, 1, 4, 99, 0x03000000)},
    **{f"{n} tensors": (part(counts=(n, 5)), "counts") for n in LENGTHS},
    **{f"{n} fields": (part(counts=(1, n)), "counts") for n in LENGTHS},
    **{f"string of {n}": (field("x", struct.pack("<IQ", 8, n)), "") for n in LENGTHS},
    **{f"array of {n} {k}": (field("x", array_header(k, n)), "x") for n in LENGTHS for k in (0, 4, 7, 8, 12)},
    "array of more strings than are there": (field("x", array_header(8, 500)), ""),
    "arrays, 5000 deep": (field("x", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000), "x"),
    "array of arrays": (field("x", array_header(9, 1) + struct.pack("<IQ", 4, 0)), "x"),
    "array of 2^62 empty arrays": (field("x", array_header(9, 2**62)), "x"),
    **{f"field of type {n}": (field("x", struct.pack("<IQ", n, 0)), "x") for n in (13, 99, 2**31)},
    "key not UTF-8": (field(b"\xff\xfe", 1), ""),
    "value not UTF-8": (field("x", struct.pack("<I", 8) + text(b"\xff")), ""),
    "key twice": (lambda f: f._replace(fields=(*f.fields, f.fields[3])), "llama.embedding_length"),
    "tensor twice": (lambda f: f._replace(tensors=(*f.tensors, f.tensors[2])), ""),
    **{f"alignment {n}": (field("general.alignment", n), "general.alignment") for n in (0, 1, 3, 2**31, 32.0, "32")},
    "alignment in an array": (field("general.alignment", [32]), "general.alignment"),
    "no axes": (tensor(DOWN, shape=()), DOWN),
    "five axes": (tensor(DOWN, shape=(24, 32, 1, 1, 1)), DOWN),
    "an empty axis": (tensor(DOWN, shape=(24, 0)), DOWN),
    "axes swapped": (tensor(DOWN, shape=(32, 24)), DOWN),
    "a product beyond 64 bits": (tensor(DOWN, shape=(2**32, 2**32)), DOWN),
    "a long vocabulary": (tensor(EMBED, shape=(32, 2**40)), ""),
    **{f"tensor of type {n}": (tensor(DOWN, kind=n), DOWN) for n in (4, 5, 99, 2**32 - 1)},
    "whole numbers for weights": (tensor(DOWN, kind=26), DOWN),
    "rows that are no multiple of a block": (tensor(DOWN, kind=8), DOWN),
    **{f"offset {n}": (tensor(DOWN, offset=n), "") for n in (2**64 - 32, 2**63, 2**40, 10**6)},
    **{f"all moved by {n}": (shifted(n), "") for n in (1, 4, 16)},
    "two in one place": (tensor(DOWN, offset=0), ""),
    "one reaching into the next": (lambda f: tensor(DOWN, offset=f.tensors[3].offset - 32)(f), ""),
    "a tensor missing": (lambda f: f._replace(tensors=f.tensors[:-1]), "tensors"),
    "no embedding": (tensor(EMBED, name="embd.weight"), ""),
    "a tensor besides": (tensor("output_norm.weight", name="blk.0.attn_q.bias"), "tensors"),
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
    "eps as a whole number": (field("llama.attention.layer_norm_rms_epsilon", 1), "llama.attention.layer_norm_rms_eps"),
    **{f"eps {x}": (field("llama.attention.layer_norm_rms_epsilon", x), "") for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"theta {x}": (field("llama.rope.freq_base", x), "") for x in (0.0, -1.0, math.nan, math.inf)},
    **{f"{n} layers": (field("llama.block_count", n), "") for n in (0, 1, 3, 2**32 - 1)},
    **{f"{n} heads": (field("llama.attention.head_count", n), "") for n in (0, 2, 5, 32, 64)},
    **{f"{n} key/value heads": (field("llama.attention.head_count_kv", n), "") for n in (0, 1, 3, 4, 8)},
    "a part of a head turned": (field("llama.rope.dimension_count", 4), "llama.rope.dimension_count"),
    "an unknown scaling": (field("llama.rope.scaling.type", "longrope"), ""),
    "another vocabulary": (field("llama.vocab_size", TINY.vocab + 1), "llama.vocab_size"),
    # What is not known may mean something else than what is computed: refused by name, not passed over.
    **{f"an unknown {name}": (field(f"llama.{name}", value), f"{name}") for name, value in {
        "rope.scale_linear": 4.0, "rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0,
        "attention.sliding_window": 16, "attention.value_length": 4, "logit_scale": 2.0, "expert_count": 8,
    }.items()},
    "no context": (field("llama.context_length", 0), ""),
    "another tokenizer": (field(f"{WORD}model", "llama"), f"{WORD}model"),
    "another cut": (field(f"{WORD}pre", "llama-bpe"), f"{WORD}pre"),
    "too few pieces": (field(f"{WORD}tokens", TOKENS[:-1]), f"{WORD}tokens"),
    "a piece twice": (item(f"{WORD}tokens", 9, TOKENS[8]), f"{WORD}tokens"),
    "pieces that are numbers": (field(f"{WORD}tokens", list(range(TINY.vocab))), f"{WORD}tokens"),
    "pieces that are one text": (field(f"{WORD}tokens", "a" * TINY.vocab), f"{WORD}tokens"),
    "a piece of letters that are no bytes": (item(f"{WORD}tokens", 9, "日"), f"{WORD}tokens"),
    "too few kinds": (field(f"{WORD}token_type", [1] * 9), f"{WORD}token_type"),
    "an unknown kind": (item(f"{WORD}token_type", 9, 77), f"{WORD}token_type"),
    "kinds that are texts": (field(f"{WORD}token_type", ["1"] * TINY.vocab), f"{WORD}token_type"),
    "merges that are numbers": (field(f"{WORD}merges", [1, 2]), f"{WORD}merges"),
    "a merge of one": (item(f"{WORD}merges", 0, "Ġt"), f"{WORD}merges"),
    "a merge of three": (item(f"{WORD}merges", 0, "Ġ t h"), f"{WORD}merges"),
    "a merge of what is no piece": (item(f"{WORD}merges", 0, "日 本"), f"{WORD}merges"),
    "a merge into what is no piece": (item(f"{WORD}merges", 0, "a b"), f"{WORD}merges"),
    "bos out of range": (field(f"{WORD}bos_token_id", TINY.vocab), f"{WORD}bos_token_id"),
    "eos out of range": (field(f"{WORD}eos_token_id", 2**32 - 1), f"{WORD}eos_token_id"),
    "eos that is a text": (field(f"{WORD}eos_token_id", "2"), f"{WORD}eos_token_id"),
    "a bos to add, and none": (
        lambda f: no_field(f"{WORD}bos_token_id")(field(f"{WORD}add_bos_token", True)(f)),
        f"{WORD}bos_token_id",
    ),
    "add_bos that is a number": (field(f"{WORD}add_bos_token", 1), f"{WORD}add_bos_token"),
    "a template that is a number": (field("tokenizer.chat_template", 5), "tokenizer.chat_template"),
    "a template that is none": (field("tokenizer.chat_template", "{% for %}"), "tokenizer.chat_template"),
}  # fmt: skip


def refused(path: Path, data: bytes, field: str) -> ll.LlamaError:
    """A file is refused: at once, without memory for what it claims to hold, in one line with name and field."""
    path.write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(ll.LlamaError) as caught:
            ll.load(path)
        took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < 2, f"took {took:.1f} s"
    assert peak < 2**26, f"took {peak >> 20} MiB"
    assert caught.value.file == str(path)
    assert field in caught.value.field
    message = str(caught.value)
    assert message.startswith(f"{path}: {caught.value.field}: got ")
    assert ", expected " in message
    assert len(message) < len(str(path)) + 400, message
    return caught.value


def test_the_file_made_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    want = ll.load(write_gguf(path, tiny_fields(), tiny_arrays()))
    for change in (part(), part(version=2), field("x", 5), field("x", ["a", "b"]), shifted(32), no_field("x")):
        path.write_bytes(change(tiny_file()).pack())
        got = ll.load(path)
        assert got.config == want.config
        assert_close(got.params, want.params, 0, "params")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_gguf_is_refused(tmp_path: Path, name: str) -> None:
    change, field = REFUSED[name]
    refused(tmp_path / "a.gguf", change(tiny_file()).pack(), field)


def test_a_gguf_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    data = tiny_file().pack()
    head = len(data) - len(tiny_file().data)
    cuts = [*range(4, 40, 5), *range(40, head, 577), head - 1, head, head + 1, len(data) - 32, len(data) - 1]
    for cut in cuts:
        refused(tmp_path / "a.gguf", data[:cut], "")


def test_a_quantised_block_with_no_scale_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_fields(), tiny_arrays(), [EMBED])
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == EMBED)
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(math.nan).tobytes()
    refused(path, bytes(data), EMBED)


def test_quantised_gains_are_read_or_refused(tmp_path: Path) -> None:
    gain = np.zeros(34, np.uint8)
    data = tiny_file()
    changed = tensor("output_norm.weight", kind=8, offset=len(data.data))(
        data._replace(data=data.data + gain.tobytes())
    )
    (tmp_path / "a.gguf").write_bytes(changed.pack())
    assert not np.asarray(ll.load(tmp_path / "a.gguf").params.norm).any()


# ---- A real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> ll.Model:
    return ll.load(ll.default_model())


def test_smollm2_is_the_published_one(smollm2: ll.Model) -> None:
    assert smollm2.config == ll.CONFIGS["smollm2-135m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == ll.count(smollm2.config) == 134_515_008
    assert {leaf.dtype.name for leaf in jax.tree.leaves(smollm2.params)} == {"float32"}
    assert smollm2.tokenizer.stops == {smollm2.tokenizer.specials[name] for name in ("<|im_end|>", "<|endoftext|>")}


def test_smollm2_has_the_weights_that_gguf_reads(smollm2: ll.Model) -> None:
    names = [
        EMBED,
        "blk.0.attn_norm.weight",
        "blk.3.attn_q.weight",
        "blk.17.attn_k.weight",
        "blk.29.attn_output.weight",
    ]
    names += ["blk.29.ffn_down.weight", "blk.8.ffn_gate.weight", "output_norm.weight"]
    found, seen = leaves(smollm2.params), set[str]()
    for tensor in gguf.GGUFReader(ll.default_model()).tensors:
        if tensor.name in names:
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(np.asarray(found[tensor.name]).ravel(), want.ravel(), tensor.name)
            seen.add(str(tensor.tensor_type))
    assert len(seen) == 3
