"""The command `tokenize`: tokenizers learned from a corpus, and the tokens of a text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from builders import write_talker
from sentencepiece import SentencePieceProcessor
from texts import ROOT, corpus, differing, drawn
from transformers import AutoTokenizer

from lovely_llama import LlamaError
from lovely_llama_tools.commands import main
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.inference.generate import generate
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, tokenizer_files
from lovely_llama_tools.tokens.pieces import bin_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_characters, train_sentencepiece

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; its stdout, or the error line."""

    def command(*words: object, status: int = 0) -> str:
        assert main(["tokenize", *map(str, words)]) == status
        out, err = capsys.readouterr()
        assert not (err if status == 0 else out)
        return out + err

    return command


def found(folder: Path) -> Tokenizer:
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer


# ---- Training --------------------------------------------------------------------------------------------------------


def test_byte_level_bpe(tmp_path: Path, run: Run) -> None:
    """Lossless on any text; its special tokens come first, and transformers reads it."""
    run("train", ROOT / "README.md", "--kind", "bpe", "--vocab", 500, "--out", tmp_path / "new")
    tokenizer, reference = found(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.specials == {"[UNK]": 0, "[PAD]": 1, "[BOS]": 2, "[EOS]": 3}
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos, len(tokenizer.pieces)) == (2, 3, True, 500)
    assert {bytes([byte]) for byte in range(256)} <= {*tokenizer.pieces}
    assert all(tokenizer.decode(tokenizer.encode(text, False)) == text for text in drawn())
    assert reference("the sky").input_ids == tokenizer.begin("the sky")


def test_merges_are_those_of_the_tokenizers_package() -> None:
    lib: Any = tokenizers
    reference = lib.Tokenizer(lib.models.BPE(unk_token="[UNK]"))
    reference.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials, alphabet = ["[UNK]", "[PAD]", "[BOS]", "[EOS]"], lib.pre_tokenizers.ByteLevel.alphabet()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator(corpus(), trainer)
    texts = [text for text in drawn(2100) if not any(special in text for special in specials)]
    assert not differing(train_bpe(corpus(), 600), lambda t: reference.encode(t).ids, texts)


def test_sentencepiece(tmp_path: Path, run: Run) -> None:
    """As llama2.c's: digits apart, byte fallback; and run.c's file has the same ids as SentencePiece's."""
    run("train", ROOT / "README.md", "--kind", "sentencepiece", "--vocab", 600, "--out", tmp_path)
    tokenizer, path = found(tmp_path), tmp_path / "tokenizer.bin"
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert not differing(tokenizer, reference.encode)
    assert not differing(bin_tokenizer(path.read_bytes(), path, 600), reference.encode)
    assert all(tokenizer.decode(tokenizer.encode(text, False)) == text for text in drawn() if "▁" not in text)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos, len(tokenizer.pieces)) == (1, 2, True, 600)
    assert not [p for p in tokenizer.pieces if len(p.strip()) > 1 and any(48 <= byte <= 57 for byte in p)]
    assert len({*tokenizer.encode("日", False)}) == 4 and tokenizer.pieces[3:259] == [bytes([b]) for b in range(256)]


def test_characters(tmp_path: Path, run: Run) -> None:
    """The characters of the corpus in the order of Unicode; a folder of texts is a corpus."""
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("bca\r\n")
    (tmp_path / "texts" / "more" / "b.txt").write_text("é😀")
    (tmp_path / "texts" / "c.bin").write_bytes(b"\xff")
    run("train", tmp_path / "texts", "--kind", "chars", "--out", tmp_path / "new")
    tokenizer, reference = found(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.pieces == [c.encode() for c in "\n\rabcé😀"]
    assert tokenizer.encode("😀\r\nab", False) == reference("😀\r\nab").input_ids == [6, 1, 0, 2, 3]


def test_training_is_the_same_every_time() -> None:
    for train, vocab in ((train_bpe, 500), (train_sentencepiece, 600)):
        first, second = (train(corpus()[:1], vocab) for _ in range(2))
        assert first.pieces == second.pieces


@pytest.mark.parametrize(
    ("train", "vocab"), [(train_bpe, 100), (train_bpe, 10**6), (train_sentencepiece, 10), (train_sentencepiece, 10**6),
                         (train_characters, 3)],
)  # fmt: skip
def test_a_vocabulary_that_the_corpus_does_not_make_is_refused(train: Any, vocab: int) -> None:
    with pytest.raises(LlamaError) as caught:
        train(["the sky is blue"], vocab)
    assert caught.value.field == "vocab"


def test_nothing_is_overwritten_unless_forced(tmp_path: Path, run: Run) -> None:
    """Then no file of the former tokenizer remains, which might be found first."""
    out, text = tmp_path / "new", ROOT / "README.md"
    run("train", text, "--vocab", 300, "--out", out)
    (out / "model.bin").write_bytes(b"a model")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for kind in ("bpe", "chars"):
        line = run("train", text, "--kind", kind, "--vocab", 300, "--out", out, status=2)
        assert line.startswith(f"error: {out}: path: got a folder with a tokenizer.json")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run("train", text, "--kind", "sentencepiece", "--vocab", 600, "--out", out, "--force")
    names = ["model.bin", "tokenizer.bin", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert len(found(out).pieces) == 600


@pytest.mark.parametrize(
    ("content", "field"), [(None, "path"), (b"a\xffb", "text"), (b"", "vocab")], ids=["absent", "not UTF-8", "empty"]
)
def test_a_corpus_that_is_none_is_refused(tmp_path: Path, run: Run, content: bytes | None, field: str) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    line = run("train", path, "--vocab", 300, "--out", tmp_path / "new", status=2)
    assert f": {field}: got " in line and len(line.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_and_no_vocab_are_refused(tmp_path: Path, run: Run) -> None:
    assert "path: got no files" in run("train", tmp_path, "--vocab", 300, "--out", tmp_path, status=2)
    assert "vocab: got nothing" in run("train", ROOT / "README.md", "--out", tmp_path, status=2)
    os.close(os.open(tmp_path / "file", os.O_CREAT))
    line = run("train", ROOT / "README.md", "--vocab", 300, "--out", tmp_path / "file", status=2)
    assert f"error: {tmp_path / 'file'}: path: got " in line


# ---- Showing ---------------------------------------------------------------------------------------------------------


def test_ids_are_shown_beside_pieces(tmp_path: Path, run: Run) -> None:
    """Those that `generate` would see; part of a character by its bytes."""
    model = write_talker(tmp_path / "a.gguf")
    lines = run("show", "the é<|im_end|>ü", "--model", model).splitlines()
    shown = [line.split(maxsplit=1) for line in lines]
    assert [int(i) for i, _ in shown] == generate(load(model), "the é<|im_end|>ü", 0).prompt
    pieces = [piece for _, piece in shown]
    assert pieces[:4] == ["'t'", "'he'", "' '", "'é'"] and pieces[-2:] == [r"b'\xc3'", r"b'\xbc'"]
    assert "<|im_end|>" not in pieces
    special = run("show", "a<|im_end|>", "--special", "--model", model).splitlines()
    assert special[-1:] == ["      2  <|im_end|>"]
    assert run("show", "", "--model", model) == "      1  <|im_start|>\n"
    tokenizer = train_bpe(corpus(), 500)._replace(adds_bos=True)
    for name, data in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    assert run("show", "the", "--model", tmp_path).startswith("      2  [BOS]\n")
    run("train", ROOT / "README.md", "--kind", "chars", "--out", tmp_path / "chars")
    assert run("show", "ab", "--model", tmp_path / "chars").count("\n") == 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, run: Run) -> None:
    assert run("show", "a", "--model", tmp_path, status=2).startswith(f"error: {tmp_path}")
