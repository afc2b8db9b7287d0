"""Conversions: from every format to every other, and through the command line to transformers and back."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from asserts import assert_close
from builders import TINY, random_params, tokenizer_of, write_talker

from lovely_llama import Config, LlamaError, count
from lovely_llama_tools import Model, load, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.formats.files import WRITERS, checkpoint

AutoTokenizer: Any = transformers.AutoTokenizer
LlamaConfig: Any = transformers.LlamaConfig
LlamaForCausalLM: Any = transformers.LlamaForCausalLM

# 6 heads over 2 of keys and values: rows permuted by the wrong number of heads would differ. llama2.c can carry it.
GQA = Config(262, 96, 2, 2, 3, 16, 160, 64, 1e-5, 1e4, None, False)
EXACT = [(to, dtype) for to, writer in WRITERS.items() for dtype in writer.dtypes if dtype == "float32"]
ROUNDED = [(to, dtype) for to, writer in WRITERS.items() for dtype in writer.dtypes if dtype != "float32"]
NOISE = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 0.012, "int8": 0.012}  # of a norm; half a step of 127 for 8 bits


@pytest.fixture(scope="module")
def drawn() -> Model:
    return Model(GQA, random_params(GQA), None)


@pytest.mark.parametrize("first", EXACT, ids="-".join)
@pytest.mark.parametrize("second", [*EXACT, *ROUNDED], ids="-".join)
def test_from_each_format_to_each(
    first: tuple[str, str], second: tuple[str, str], drawn: Model, tmp_path: Path
) -> None:
    """Parameters stay the same, or as near as the numbers of the format are."""
    save(drawn, tmp_path / "first", *first)
    save(load(tmp_path / "first"), tmp_path / "second", *second)
    end = load(tmp_path / "second")
    assert end.config == GQA
    bound = NOISE.get(second[1], 0)
    assert_close(end.params, drawn.params, bound, "params")
    if bound:
        with pytest.raises(AssertionError):
            assert_close(end.params, drawn.params, bound / 20, "params")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("to", "dtype"), EXACT)
def test_ties_survive(to: str, dtype: str, tied: bool, tmp_path: Path) -> None:
    config = replace(GQA, tied=tied)
    save(Model(config, random_params(config), None), tmp_path / "model", to, dtype)
    assert load(tmp_path / "model").config.tied == tied


def saved_by_transformers(folder: Path) -> Path:
    """A random Llama: grouped queries, llama3's scaling, several files of bfloat16, a tokenizer and a template."""
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=131072, rope_theta=5e5, rope_scaling=scaling, rms_norm_eps=1e-5,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    bpe: Any = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the sky is blue, and the sea is bluer"] * 3, 300, 1, False, ["<s>", "</s>"])
    template = "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}"
    fast: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    fast.save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


def in_transformers(folder: Path) -> tuple[dict[str, Any], "np.ndarray[Any, Any]", list[int]]:
    """A model's parameters there, its logits for positions up to 100, and the ids of a text."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(np.random.default_rng(0).integers(300, size=(1, 100)))
    with torch.no_grad():
        scores = model(tokens).logits.numpy()
    ids = AutoTokenizer.from_pretrained(folder)("the sky, bluer than the sea: été ☁")["input_ids"]
    return dict(model.named_parameters()), scores, ids


def test_transformers_reads_the_end_as_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder is inspected, continues a text, and goes to GGUF and back."""
    begin, gguf, end = saved_by_transformers(tmp_path / "begin"), tmp_path / "model.gguf", tmp_path / "end"
    assert main(["inspect", str(begin), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with checkpoint(begin) as found:
        assert report["parameters"] == report["parameters_in_file"] == count(found.config)
    assert report["rotary_pairs"] == "split into halves" and report["numbers_by_dtype"].keys() == {"BF16"}
    assert main(["generate", "the sky", "--model", str(begin), "--max-new", "5", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert main(["convert", str(begin), str(gguf)]) == 0
    assert main(["generate", "the sky", "--model", str(gguf), "--max-new", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith(said)
    assert main(["convert", str(gguf), str(end)]) == 0
    (before, scores, ids), (after, same_scores, same_ids) = in_transformers(begin), in_transformers(end)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(scores, same_scores)
    assert ids == same_ids
    assert tokenizer_of(load(begin)).template == tokenizer_of(load(end)).template


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, mine = write_talker(tmp_path / "a.gguf"), tmp_path / "b", tmp_path / "mine"
    mine.mkdir()
    (mine / "mine").write_text("mine")
    assert main(["convert", str(source), str(target)]) == 0
    for path, force, says in (
        (target, [], "path: got a path that exists, expected a new one, or --force"),
        (mine, [], "path: got a path that exists, expected a new one, or --force"),
        (mine, ["--force"], "path: got a folder with mine, expected one with a checkpoint alone, to be replaced"),
    ):
        capsys.readouterr()
        assert main(["convert", str(source), str(path), *force]) == 2
        assert capsys.readouterr().err == f"error: {path}: {says}\n"
    assert [path.name for path in mine.iterdir()] == ["mine"]
    (target / "README.md").write_text("old")
    assert main(["convert", str(source), str(target), "--force"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: ")
    assert load(target).config.dim == TINY.dim and not (target / "README.md").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b", "mine"]


@pytest.mark.parametrize(
    ("target", "says"),
    [("m", "which is read"), ("link/m", "which is read"), ("m/sub/..", "which is read"), (".", "path: got "),
     ("..", "path: got "), ("m/sub", "a folder within"), ("m/orbax", "a folder within"), ("x", "x/m in it")],
)  # fmt: skip
def test_the_source_is_not_written_over(
    target: str, says: str, drawn: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nor a folder that it is in, nor does a folder go into it; by whatever name. A file in it is as any other."""
    (tmp_path / "link").symlink_to(tmp_path)
    for source in ("m", "x/m"):
        save(drawn, tmp_path / source)
    (tmp_path / "m" / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    source = "x/m" if target == "x" else "m"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["convert", source, target, "--force"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["convert", "m", "m/model.gguf"]) == main(["inspect", "m"]) == 0


@pytest.mark.parametrize(
    ("name", "to"),
    [("m.xyz", None), ("m.safetensors", None), ("m.q8_0", None), ("m.H5", None), ("M.GGUF", "GGUF"),
     ("m.Bin", "llama2.c 0"), ("SmolLM2-1.7B", "Hugging Face"), ("run.v2", "Hugging Face"), (".m", "Hugging Face"),
     ("Llama-3.1-8B-Instruct", "Hugging Face")],
)  # fmt: skip
def test_a_suffix_names_a_format_or_none(
    name: str, to: str | None, drawn: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that looks like a file's, but is unknown, is refused unless --to tells the format. A version is none."""
    save(drawn, tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / name)]) == (2 if to is None else 0)
    if to is None:
        says = "expected .gguf, .bin, none for a folder, or --to with one of gguf, hf, llama2c-v0, "
        start = f"error: {tmp_path / name}: path: got the suffix {Path(name).suffix}, {says}"
        assert capsys.readouterr().err.startswith(start)
        assert main(["convert", str(tmp_path / "m"), str(tmp_path / name), "--to", "hf"]) == 0
    with checkpoint(tmp_path / name) as found:
        assert found.format == (to or "Hugging Face")


def test_fields_are_dropped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By several options or a list; what is dropped is not told."""
    source = write_talker(tmp_path / "a.gguf")
    assert main(["convert", str(source), str(tmp_path / "b.bin")]) == 0
    assert capsys.readouterr().err == f"note: {tmp_path / 'b.bin'}: no place in this format for template\n"
    options = ["--drop", "template,stops", "--drop", "sampling"]
    assert main(["convert", str(source), str(tmp_path / "c" / "c.bin"), *options]) == 0
    assert not capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "d"), "--drop", "warmth"]) == 2
    assert "drop: got warmth, expected tokenizer, ids, stops, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "dtype", "says", "bound"),
    [("hf", "float32", "transformers: error of the logits", 1e-5),
     ("hf", "bfloat16", "transformers: error of the logits", 0.1),
     ("gguf", "float32", "gguf: error of the parameters", 0),
     ("gguf", "q8_0", "gguf: error of the parameters", 0.01)],
)  # fmt: skip
def test_another_program_verifies(
    to: str, dtype: str, says: str, bound: float, drawn: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(drawn, tmp_path / "m")
    words = ["convert", str(tmp_path / "m"), str(tmp_path / "to"), "--to", to, "--dtype", dtype, "--verify"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    line, _, error = out.splitlines()[-1].rpartition(" ")
    assert line == says and not err
    assert float(error) <= bound and (dtype == "float32" or float(error) > bound / 100)


@pytest.mark.parametrize("to", WRITERS)
def test_a_full_disk_leaves_what_was_there(
    to: str, drawn: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model still loads, and no part of the new one remains."""

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model"
    save(drawn, path, to)
    before, files = load(path), sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlamaError, match="No space left"):
        save(drawn._replace(params=random_params(GQA, 1)), path, to, force=True)
    assert_close(load(path).params, before.params, 0)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(("wrong", "field"), [(("onnx", None), "to"), (("llama2c-v0", "bfloat16"), "dtype")])
def test_a_format_must_be_known(wrong: tuple[str, str | None], field: str, drawn: Model, tmp_path: Path) -> None:
    with pytest.raises(LlamaError) as caught:
        save(drawn, tmp_path / "model", *wrong)
    assert caught.value.field == field


def test_a_place_that_cannot_be_written_to_is_refused(drawn: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "model", tmp_path / "a\0b"):
        with pytest.raises(LlamaError, match=": path: got "):
            save(drawn, path)
