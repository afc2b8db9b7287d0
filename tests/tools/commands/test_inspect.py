"""`inspect`: fields, counts and tensors are those of the file, and of our parameters."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from builders import TINY, tiny_arrays, tiny_fields, write_gguf

from lovely_llama import CONFIGS, count
from lovely_llama_tools.commands import main


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fields = tiny_fields() | {"general.name": "Tiny\nLlama"}
    quantised = [name for name in tiny_arrays() if name.endswith("attn_q.weight")]
    return write_gguf(tmp_path / "tiny.gguf", fields, tiny_arrays(), quantised)


def test_what_a_file_holds_is_reported(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, shapes, dtypes and norms as the gguf package reads them; counts by formula and by file."""
    report = json.loads(inspect(capsys, path, "--json"))
    assert report["file"] == str(path) and report["format"].startswith("GGUF")
    assert report["parameters"] == report["parameters_in_file"] == count(TINY)
    assert report["config"]["head_dim"] == TINY.head_dim and report["tied"] is True
    tensors = {row["file"]: row for row in report["tensors"]}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        row, array = tensors[name], gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert row["file_shape"] == [*map(int, reversed(tensor.shape))]
        assert row["dtype"] == tensor.tensor_type.name and row["not_finite"] == 0
        assert row["norm"] == pytest.approx(float(np.linalg.norm(array)), rel=1e-6)
    assert tensors["blk.1.attn_q.weight"]["ours"] == ".blocks[1].attn.q"
    assert tensors["blk.1.attn_q.weight"]["shape"] == [2, 2, 8, 32]
    fields = {field["name"]: field for field in report["fields"]}
    assert fields["llama.block_count"] == {"name": "llama.block_count", "value": 2, "status": "honoured"}
    assert report["tokenizer"]["bos"] == "1 <|im_start|>" and report["tokenizer"]["template"]


def test_the_text_says_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, path)
    assert f"parameters          {count(TINY):,}\n" in text
    assert "rotary pairs        neighbours\n" in text
    assert "Tiny\\nLlama" in text  # what is not printable does not reach a terminal
    (row,) = (line for line in text.splitlines() if line.startswith(".blocks[1].attn.q "))
    assert "blk.1.attn_q.weight" in row and "  32 × 32  " in row and " Q8_0 " in row


def test_values_that_are_not_finite_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a model is not loaded, but it can be looked at."""
    arrays = tiny_arrays()
    arrays["blk.0.attn_v.weight"][1, 2:4] = np.nan, -np.inf
    bad = write_gguf(tmp_path / "bad.gguf", tiny_fields(), arrays)
    report = json.loads(inspect(capsys, bad, "--json"))
    assert report["not_finite"] == 2
    assert [row["file"] for row in report["tensors"] if row["not_finite"]] == ["blk.0.attn_v.weight"]


def test_a_published_config_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, "llama-2-7b")
    assert "6,738,415,616" in text
    assert ".blocks[0…31].attn.q     32 × 1 × 128 × 4,096  model.layers.0…31.self_attn.q_proj.weight" in text
    report: dict[str, Any] = json.loads(inspect(capsys, "llama-3.1-405b", "--json"))
    assert report["parameters"] == count(CONFIGS["llama-3.1-405b"]) == 405_853_388_800


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_gguf(tmp_path / "bad.gguf", tiny_fields() | {"llama.expert_count": 8}, tiny_arrays())
    assert main(["inspect", str(bad)]) == 2
    assert "llama.expert_count: got" in capsys.readouterr().err
