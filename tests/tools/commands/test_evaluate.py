"""`evaluate`: perplexity as transformers computes it, over the same windows; and what cannot be scored is refused."""

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import TINY, counting_model, random_params, tiny_arrays, tiny_fields, tokenizer_of, write_gguf
from transformers import AutoTokenizer, LlamaForCausalLM

from lovely_llama import LlamaError
from lovely_llama_tools import Model, load, perplexity, save
from lovely_llama_tools.commands import main
from lovely_llama_tools.inference.scoring import scores

TEXT = "the é theory of the sea\n" * 7  # of 161 tokens or so, two and a half contexts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in Hugging Face's format, with a tokenizer that adds no BOS."""
    path = tmp_path_factory.mktemp("model")
    model = load(write_gguf(path / "tiny.gguf", tiny_fields(), tiny_arrays()))
    save(model, path / "hf")
    return path / "hf"


def theirs(oracle: Any, tokens: list[int], ctx: int, stride: int) -> tuple[float, int]:
    """The recipe of transformers' documentation on perplexity: nats, and tokens scored."""
    ids, before, nats, count = torch.tensor([tokens]), 0, 0.0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + ctx, len(tokens))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : before - end] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nats += float(oracle(window, labels=labels).loss) * scored
        count, before = count + scored, end
        if end == len(tokens):
            break
    return nats, count


@pytest.mark.parametrize(("ctx", "stride"), [(64, 32), (64, 63), (64, 1), (37, 20), (2, 1)])
def test_perplexity_is_that_of_transformers(folder: Path, ctx: int, stride: int) -> None:
    """Over the same windows; each token but the first is scored once."""
    model = load(folder)
    tokens = tokenizer_of(model).begin(TEXT)
    oracle: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, count = theirs(oracle, tokens, ctx, stride)
    found = perplexity(model, TEXT, ctx, stride)
    assert found.tokens == count == len(tokens) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found.bytes == len(TEXT.encode()) - 1  # but for the first token, a letter
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-4)
    assert perplexity(model._replace(tokenizer=None), tokens, ctx, stride).nats == found.nats


def test_bos_comes_first_where_the_model_expects_it(folder: Path) -> None:
    """Then every byte of the text is scored."""
    model = load(folder)
    expects = model._replace(tokenizer=tokenizer_of(model)._replace(adds_bos=True))
    found = perplexity(expects, "the sea")
    assert (found.tokens, found.bytes) == (len(tokenizer_of(model).begin("the sea")), 7)
    assert perplexity(model, [1, *tokenizer_of(model).begin("the sea")]).nats == found.nats


def test_a_counting_model_is_not_surprised() -> None:
    """Which tokens are the likeliest is known of this one: each is followed by the next."""
    model = counting_model([b"a"])
    found = scores(model, [3, 4, 9, 10], [4, 5, 10, 12])
    assert found.likeliest.tolist() == [True, True, True, False]
    logits = np.zeros(32)
    logits[4] = math.sqrt(32)
    assert found.nats[0] == pytest.approx(np.log(np.exp(logits).sum()) - logits[4], rel=2e-3)  # but for eps


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files, and stdin, the tokens are summed."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(TEXT)
    second.write_text("the sea")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the é".encode())))
    command = ["evaluate", str(folder), str(first), str(second), "-", "--ctx", "40", "--stride", "30"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    want = [perplexity(load(folder), text, 40, 30) for text in (TEXT, "the sea", "the é")]
    assert report["tokens"] == sum(score.tokens for score in want)
    assert report["bytes"] == sum(score.bytes or 0 for score in want)
    nats = sum(score.nats for score in want) / report["tokens"]
    assert report["nats_per_token"] == pytest.approx(nats)
    assert report["perplexity"] == pytest.approx(math.exp(nats))
    assert report["tokens_per_s"] > 0
    assert main(["evaluate", str(folder), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines] == [
        "perplexity", "bits per byte", "nats per token", "tokens", "bytes", "tokens per s",
    ]  # fmt: skip


def test_a_model_without_a_tokenizer_scores_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(replace(TINY, vocab=29), random_params(replace(TINY, vocab=29)), None)
    save(model, tmp_path / "hf")
    (tmp_path / "ids").write_text("1 5 7, 28\n")
    assert main(["evaluate", str(tmp_path / "hf"), str(tmp_path / "ids"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nats_per_token"] == pytest.approx(perplexity(model, [1, 5, 7, 28]).nats_per_token)
    assert report["bits_per_byte"] is None
    (tmp_path / "ids").write_text("1 29")
    assert main(["evaluate", str(tmp_path / "hf"), str(tmp_path / "ids")]) == 2
    assert "tokens: got [29], expected ids from 0 to 28" in capsys.readouterr().err
    (tmp_path / "ids").write_text("words")
    assert main(["evaluate", str(tmp_path / "hf"), str(tmp_path / "ids")]) == 2
    assert "tokenizer: got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"", [], "{file}: text: got nothing"),
        (b"t", [], "{file}: text: got 1 token, expected at least 2 tokens"),
        (b"caf\xe9", [], "{file}: text: got bytes that are not UTF-8 at byte 3"),
        (b"the sea", ["--ctx", "65"], "arguments: ctx: got 65, expected a whole number from 2 to 64"),
        (b"the sea", ["--ctx", "1"], "arguments: ctx: got 1"),
        (b"the sea", ["--ctx", "9", "--stride", "9"], "arguments: stride: got 9, expected a whole number from 1 to 8"),
        (b"the sea", ["--stride", "0"], "arguments: stride: got 0"),
        (b"the sea", ["--tasks", "arc"], "arguments: TEXT: got both texts and --tasks"),
        (None, [], "{file}: path: got no such file"),
    ],
)
def test_bad_input_is_refused(
    content: bytes | None, options: list[str], says: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    assert main(["evaluate", str(folder), str(file), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: " + says.format(file=file)), captured.err


def test_nothing_to_evaluate_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder)]) == 2
    assert "TEXT: got none, expected a file, - for stdin, or --tasks" in capsys.readouterr().err
    with pytest.raises(LlamaError, match="text: got nothing"):
        perplexity(load(folder), "")
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    for option in ("MODEL", "TEXT", "--ctx", "--stride", "--tasks", "--include-path", "--num-fewshot", "--json"):
        assert option in shown


def test_the_answers_of_conversations_are_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training learns them: each answer, and the token that ends it, given all that precedes."""
    talks = [
        [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "the é"}],
        [{"role": "user", "content": "the theory " * 9}, {"role": "assistant", "content": "the end"}],
        [{"role": "user", "content": "no answer"}],
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"messages": talk} for talk in talks]))
    assert main(["evaluate", str(folder), str(path), "--ctx", "64", "--json"]) == 0
    captured = capsys.readouterr()
    oracle: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference: Any = AutoTokenizer.from_pretrained(folder)
    ids = reference.apply_chat_template(talks[0])["input_ids"]
    begin = len(reference.apply_chat_template(talks[0][:1], add_generation_prompt=True)["input_ids"])
    end = ids.index(reference.convert_tokens_to_ids("<|im_end|>"), begin) + 1
    with torch.no_grad():
        logits = oracle(torch.tensor([ids])).logits[0]
    nats = torch.nn.functional.cross_entropy(logits[begin - 1 : end - 1], torch.tensor(ids[begin:end]), reduction="sum")
    found = json.loads(captured.out)
    assert (found["tokens"], found["bytes"]) == (end - begin, len("the é".encode()))
    assert found["nats_per_token"] == pytest.approx(float(nats) / (end - begin), rel=1e-5)
    assert f"note: 2 rows left out: {path}, row 2: no answer in 64 tokens; {path}, row 3: messages: got" in captured.err
    assert main(["evaluate", str(folder), str(path), "--ctx", "2"]) == 2
    assert "rows: got none that can be scored" in capsys.readouterr().err
