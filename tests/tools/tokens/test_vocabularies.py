"""Vocabularies: on 2,000 texts drawn from all of Unicode, the ids that the reference libraries give."""

import base64
import pickle
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import regex
import tiktoken
import tokenizers
from builders import write_gguf
from sentencepiece import SentencePieceProcessor
from texts import ROOT, corpus, differing, drawn
from transformers import AutoTokenizer

from lovely_llama import LlamaError
from lovely_llama_tools.formats.files import default_model
from lovely_llama_tools.formats.gguf_header import scan_gguf
from lovely_llama_tools.tokens import (
    Tokenizer,
    fit,
    folder_tokenizer,
    gguf_tokenizer,
    sentencepiece_tokenizer,
    tokenizer_bin,
    tokenizer_fields,
)
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.tokens.pieces import bin_tokenizer
from lovely_llama_tools.tokens.pipelines import GPT2, LLAMA3, json_tokenizer
from lovely_llama_tools.tokens.ranks import LLAMA3_SPECIALS, describe_ranks, gpt2_tokenizer, rank_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

SHARED = ROOT.parent / "shared/data"
GGUF = Path("a.gguf")


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@cache
def ranks() -> dict[bytes, int]:
    """A byte-level vocabulary: every byte, then what merges of the corpus make."""
    tokenizer = train_bpe(corpus(), 1500)
    return {piece: i for i, piece in enumerate(tokenizer.pieces[4:])}


def rank_file() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks().items())


# ---- SentencePiece ---------------------------------------------------------------------------------------------------


def llama2() -> Tokenizer:
    path = need(SHARED / "llama2-tokenizer.model")
    return sentencepiece_tokenizer(path.read_bytes(), path)


def llama2_bin() -> Tokenizer:
    path = need(SHARED / "llama2-tokenizer.bin")
    return bin_tokenizer(path.read_bytes(), path, 32000)


def through_gguf(tokenizer: Tokenizer) -> Tokenizer:
    vocab = len(tokenizer.pieces)
    return gguf_tokenizer(tokenizer_fields(tokenizer, vocab), vocab, GGUF)


@pytest.mark.parametrize("get", [llama2, llama2_bin, lambda: through_gguf(llama2())], ids=["model", "bin", "gguf"])
def test_llama2_is_sentencepieces(get: Callable[[], Tokenizer]) -> None:
    """From SentencePiece's own file, from llama2.c's, and from the arrays of a GGUF."""
    reference = SentencePieceProcessor(model_file=str(need(SHARED / "llama2-tokenizer.model")))
    tokenizer = get()
    assert not differing(tokenizer, reference.encode)
    assert all(tokenizer.decode(tokenizer.encode(t, False)) == reference.decode(reference.encode(t)) for t in drawn())
    assert tokenizer._replace(encode=str.split) == llama2()._replace(encode=str.split), "but for its code"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos, tokenizer.stops) == (1, 2, True, frozenset({2}))


def test_tokenizer_bin_is_llama2cs() -> None:
    assert tokenizer_bin(llama2()) == need(SHARED / "llama2-tokenizer.bin").read_bytes()


def test_a_sentencepiece_vocabulary_of_a_gguf_is_transformers(tmp_path: Path) -> None:
    """It reads scores by way of merges, and puts no space before a text that begins with one."""
    tokenizer = train_sentencepiece(corpus()[:2], 700)
    fields = tokenizer_fields(tokenizer, 700)
    read = gguf_tokenizer(fields, 700, GGUF)
    assert not differing(read, partial(plain, tokenizer))
    texts = [text for text in drawn(2500) if not text.startswith((" ", "▁"))]
    assert not differing(read, partial(plain_ids, through_transformers(tmp_path, fields)), texts)


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, False)


def plain_ids(reference: Any, text: str) -> list[int]:
    """The ids of a transformers tokenizer, with the names of special tokens as text."""
    return reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def through_transformers(folder: Path, fields: dict[str, Any]) -> Any:
    return AutoTokenizer.from_pretrained(write_gguf(folder / "a.gguf", fields, {}).parent, gguf_file="a.gguf")


def test_names_of_special_tokens_are_text_unless_asked_for() -> None:
    """Between them, each part is a text of its own, as in Meta's code."""
    tokenizer = train_sentencepiece(corpus()[:2], 700)
    for text in ("<s>[INST] Hi [/INST] Hello </s><s>", "a<unk> b", "</s>", "x"):
        parts = regex.split("(<s>|</s>|<unk>)", text)
        want = [i for p in parts for i in ([tokenizer.specials[p]] if p in tokenizer.specials else plain(tokenizer, p))]
        assert tokenizer.encode(text, True) == want
        assert not {*tokenizer.encode(text, False)} & {*tokenizer.specials.values()}
        assert tokenizer.decode(tokenizer.encode(text, False)) == text


# ---- Byte-level BPE --------------------------------------------------------------------------------------------------

SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
END = "<|endoftext|>"


def vocabulary_fields(pre: str) -> dict[str, Any]:
    """A GGUF's keys for the vocabulary of `ranks`."""
    n, model = len(ranks()), describe_ranks(ranks(), "gpt-2", {}, GGUF)["model"]
    fields = {
        "model": "gpt2", "pre": pre, "tokens": [*model["vocab"], END], "token_type": [1] * n + [3],
        "merges": model["merges"], "bos_token_id": n, "eos_token_id": n,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def split(text: str, patterns: Sequence[str]) -> list[str]:
    """As llama.cpp splits: by each pattern in turn, into its matches and what is between them."""
    parts = [text]
    for pattern in patterns:
        parts = [part for whole in parts for part in regex.split(f"({pattern})", whole) if part]
    return parts


@pytest.mark.parametrize("pre", SPLITS)
def test_a_byte_level_vocabulary_of_a_gguf_is_split_as_its_name_says(pre: str) -> None:
    """By the package regex, and each part encoded by tiktoken. They differ on characters that are not assigned."""
    n = len(ranks())
    tokenizer = gguf_tokenizer(vocabulary_fields(pre), n + 1, GGUF)
    whole = tiktoken.Encoding("whole", pat_str="(?s:.+)", mergeable_ranks=ranks(), special_tokens={})
    texts = [text for text in drawn(4000) if not any(unicodedata.category(c) == "Cn" for c in text)]
    patterns = SPLITS[pre]
    assert not differing(tokenizer, lambda t: [i for p in split(t, patterns) for i in whole.encode_ordinary(p)], texts)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops, tokenizer.adds_bos) == (n, n, {n}, pre == "llama-bpe")
    assert all(tokenizer.decode(plain(tokenizer, text)) == text for text in drawn())


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_a_byte_level_vocabulary_of_a_gguf_is_transformers(tmp_path: Path, pre: str) -> None:
    tokenizer = gguf_tokenizer(vocabulary_fields(pre), len(ranks()) + 1, GGUF)
    assert not differing(tokenizer, partial(plain_ids, through_transformers(tmp_path, vocabulary_fields(pre))))


def test_user_defined_tokens_are_words_that_are_always_found(tmp_path: Path) -> None:
    """As in llama.cpp and in transformers."""
    fields = vocabulary_fields("gpt-2")
    fields["tokenizer.ggml.tokens"] += ["<think>", "<pad>"]
    fields["tokenizer.ggml.token_type"] += [4, 5]
    n = len(ranks())
    tokenizer = gguf_tokenizer(fields, n + 3, GGUF)
    text = f"a<think>b{END}"
    assert tokenizer.encode(text, False) == plain_ids(through_transformers(tmp_path, fields), text)
    assert n + 1 in tokenizer.encode(text, False) and tokenizer.decode(tokenizer.encode(text, False)) == text
    assert n not in tokenizer.encode(text, False) and tokenizer.encode(text, True)[-1] == n
    assert [*tokenizer.specials] == [END]


def test_llama3s_ranks_are_tiktokens() -> None:
    tokenizer = rank_tokenizer(rank_file(), "tokenizer.model")
    specials = {name: len(ranks()) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks(), special_tokens=specials)
    assert not differing(tokenizer, reference.encode_ordinary)
    assert all(tokenizer.encode(text, True) == reference.encode(text, allowed_special="all") for text in drawn())
    turn = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert tokenizer.encode(turn, True) == reference.encode(turn, allowed_special="all")
    assert all(tokenizer.decode(plain(tokenizer, text)) == text for text in drawn())
    n = len(ranks())
    assert len(tokenizer.pieces) == n + 256 and tokenizer.specials == specials
    assert tokenizer.stops == {n + 1, n + 8, n + 9} and (tokenizer.bos, tokenizer.adds_bos) == (n, True)


def test_gpt2_is_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(ranks())
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # as tiktoken has it
    reference = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks(), special_tokens={END: n})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": reference}.__getitem__)  # the real one is fetched
    tokenizer = gpt2_tokenizer()
    assert not differing(tokenizer, reference.encode_ordinary)
    assert tokenizer.encode(END, True) == [n] and tokenizer.begin("") == [n] and tokenizer.stops == {n}


def test_smollm2_is_transformers() -> None:
    """Of the GGUF's own vocabulary, but for the bytes that it lacks; see test_tokens.py for its split."""
    path = default_model()
    with open(path, "rb") as file:
        fields = scan_gguf(file, path)[0]
    vocab = len(fields["tokenizer.ggml.tokens"])
    tokenizer = gguf_tokenizer(fields, vocab, path)
    reference: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    known = {piece[0] for piece in tokenizer.pieces if len(piece) == 1}
    texts = [t for t in drawn(6000) if {*t.encode()} <= known and not any(c.isnumeric() for c in t)]
    assert not differing(tokenizer, partial(plain_ids, reference), texts)
    written = tokenizer_fields(tokenizer, vocab)
    read = {name: fields[name] for name in written}
    assert written == {name: [*value] if type(value) is memoryview else value for name, value in read.items()}


# ---- tokenizer.json, and characters ----------------------------------------------------------------------------------


def test_a_tokenizer_json_is_run_by_tokenizers() -> None:
    """And what it says about truncation and padding is not done: no token may be lost in silence."""
    source = train_bpe(corpus(), 600).encode.source  # pyright: ignore[reportFunctionMemberAccess]
    reference = tokenizers.Tokenizer.from_str(source)
    reference.encode_special_tokens = True
    want = {text: reference.encode(text, add_special_tokens=False).ids for text in drawn()}
    reference.enable_truncation(2)
    reference.enable_padding(length=50)
    tokenizer = json_tokenizer(reference.to_str().encode(), "tokenizer.json")
    assert not differing(tokenizer, want.__getitem__)
    assert all(tokenizer.decode(plain(tokenizer, text)) == text for text in drawn())
    assert tokenizer.begin("a") == tokenizers.Tokenizer.from_str(source).encode("a").ids


def test_characters() -> None:
    tokenizer = characters_tokenizer("abé 😀\n")
    assert plain(tokenizer, "é😀 a\n") == [2, 4, 3, 0, 5]
    assert tokenizer.decode([2, 4, 3, 0, 5]) == "é😀 a\n"
    with pytest.raises(LlamaError, match=r"text: got characters \['z'\]"):
        tokenizer.encode("az", False)


# ---- All -------------------------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: train_sentencepiece(corpus()[:2], 700),
    "json": lambda: train_bpe(corpus(), 600),
    "ranks": lambda: rank_tokenizer(rank_file(), "tokenizer.model"),
    "gguf": lambda: gguf_tokenizer(vocabulary_fields("default"), len(ranks()) + 1, GGUF),
    "characters": lambda: characters_tokenizer("".join(sorted({*"".join(drawn())}))),
}


@pytest.mark.parametrize("name", ALL)
def test_a_tokenizer_pickles_and_prints_in_a_line(name: str) -> None:
    tokenizer = ALL[name]()
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again._replace(encode=tokenizer.encode) == tokenizer
    assert not differing(again, partial(plain, tokenizer))
    assert regex.fullmatch(r"Tokenizer\([\d,]+ pieces, \d+ special, without a chat template\)", repr(again))
    assert all(again.decode(plain(again, text)) == text for text in drawn() if "▁" not in text)


@pytest.mark.parametrize("name", ALL)
def test_a_model_may_have_more_tokens_than_its_tokenizer(name: str) -> None:
    """They add nothing to a text. It may not have fewer."""
    tokenizer = ALL[name]()
    vocab = len(tokenizer.pieces)
    wide = fit(tokenizer, vocab + 3, "file")
    assert wide.decode([*plain(wide, "sky"), vocab, vocab + 2]) == "sky"
    with pytest.raises(LlamaError, match=f"^file: pieces: got {vocab}, expected at most {vocab // 2}, "):
        fit(tokenizer, vocab // 2, "file")


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert folder_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert folder_tokenizer(tmp_path, 100) is None
