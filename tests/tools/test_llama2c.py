"""llama2.c's checkpoints: upstream's files reproduce its logits; invalid files are refused, with the field named."""

import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from asserts import assert_close, assert_refused
from builders import LLAMA2_C, read_recording, tokenizer_of, write_sentencepiece
from jax import numpy as jnp

from lovely_llama import Config, LlamaError, logits
from lovely_llama_tools.files import load


@pytest.fixture(scope="module")
def llama2c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that upstream's export.py wrote, and a matching tokenizer."""
    folder = tmp_path_factory.mktemp("llama2c")
    for name in ("tied", "untied"):
        for version in range(3):
            shutil.copy(LLAMA2_C / f"{name}.v{version}.bin", folder)
    write_sentencepiece(folder / "tokenizer.model", 44)
    return folder


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_llama2c_file_gives_the_recorded_logits(llama2c: Path, name: str) -> None:
    model, recorded = load(llama2c / f"{name}.v0.bin"), read_recording(f"{name}.bin")[0]
    assert model.config == Config(80, 64, 2, 4, 2, 8, 128, 32, 1e-5, 1e4, None, name == "tied")
    assert tokenizer_of(model).pieces[44:] == [b""] * 36  # ids without a piece in the tokenizer
    assert all(tokenizer_of(model).pieces[3:44])
    tokens, want = jnp.array(recorded["tokens"][0], jnp.int32), recorded["logits"][0]
    assert_close(logits(model.params, tokens, model.config), want, 1e-5, "logits")


def header(**fields: int) -> Callable[[bytes], bytes]:
    """Change fields of the header and nothing else."""
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
        (header(dim=2**31 - 1), "n_heads"),
        *((header(**{name: 2**31 - 1}), "size") for name in ("hidden_dim", "n_layers", "max_seq_len")),
        (header(n_heads=5), "n_heads"),
        (header(n_heads=64), "head_dim"),
        (header(n_kv_heads=3), "n_kv_heads"),
        (header(n_kv_heads=16), "n_kv_heads"),
        (header(vocab_size=-80), "size"),
        (header(hidden_dim=127), "size"),
        (header(vocab_size=40), "size"),
        (lambda data: b"PK\3\4" + data, "contents"),
        (lambda data: b"<!DOCTYPE html>" + data, "contents"),
        (lambda data: struct.pack("<Q", 40) + b'{"a": {"dtype": "F32", "shape": []}}' + data, "contents"),
        (put(28 + 4 * 100, math.nan), "tok_embeddings.weight"),
        (put(28 + 4 * 80 * 64, math.inf), "layers.0.attention_norm.weight"),
    ],
)
def test_invalid_llama2c_files_are_refused(
    llama2c: Path, tmp_path: Path, change: Callable[[bytes], bytes], field: str
) -> None:
    shutil.copy(llama2c / "tokenizer.model", tmp_path)
    assert_refused(tmp_path / "model.bin", change((llama2c / "tied.v0.bin").read_bytes()), field)


@pytest.mark.parametrize("version", [1, 2])
def test_unsupported_llama2c_versions_are_named(llama2c: Path, version: int) -> None:
    with pytest.raises(LlamaError, match=r"llama2\.c version 1 or 2"):
        load(llama2c / f"tied.v{version}.bin")


def test_a_vocab_size_of_the_wrong_sign_is_reported(llama2c: Path, tmp_path: Path) -> None:
    data = header(vocab_size=80)((llama2c / "untied.v0.bin").read_bytes())
    assert "sign" in assert_refused(tmp_path / "model.bin", data, "size")


def test_a_tokenizer_must_exist_and_match(llama2c: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama2c / "tied.v0.bin", tmp_path))
    beside = tmp_path / "tokenizer.model"
    for contents in (None, b"", b"<html>", b"\x08\x01" * 50):
        if contents is not None:
            beside.write_bytes(contents)
        with pytest.raises(LlamaError) as caught:
            load(path)
        assert caught.value.file == str(beside)
    vocab = 40
    small = header(vocab_size=vocab)(path.read_bytes())
    path.write_bytes(small[: -4 * 64 * (80 - vocab)])
    write_sentencepiece(beside, 44)
    with pytest.raises(LlamaError, match="got 44, expected at most 40"):
        load(path)
    write_sentencepiece(beside, 40)
    assert load(path).config.vocab == 40
