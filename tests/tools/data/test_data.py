"""Corpora to batches: which tokens they hold, in which order, and what a token may see and learn."""

import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asserts import jit
from builders import SMALL, random_params
from jax import numpy as jnp
from texts import MESSAGES, ROOT, corpus, tokenizer_with
from transformers import AutoTokenizer

from lovely_llama import LlamaError, logits, loss
from lovely_llama_tools.data import corpora
from lovely_llama_tools.data.prepare import Batch, Corpus, Split, ahead, prepare
from lovely_llama_tools.formats.files import checkpoint, default_model
from lovely_llama_tools.tokens import Tokenizer, folder_tokenizer, parts, tokenizer_files
from lovely_llama_tools.tokens.base import with_ends
from lovely_llama_tools.tokens.characters import characters_tokenizer
from lovely_llama_tools.tokens.training import train_bpe, train_sentencepiece

README, ALPHABET = ROOT / "README.md", "abcdefghijklmnopqrstuvwxyz <|>_\n"

# ---- Texts -----------------------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> Iterator[list[tuple[int, int]]]:
    """The tokens of each row that have targets, with these."""
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        yield [(token, target) for token, target in zip(tokens, targets, strict=True) if target >= 0]


def all_rows(split: Split, rows: int = 7) -> list[list[tuple[int, int]]]:
    return [row for batch in split.sweep(rows) for row in rows_of(batch) if row]


def test_characters_are_split_as_nanogpt_splits_them(tmp_path: Path) -> None:
    """data/shakespeare_char/prepare.py: sorted characters, 90 % to train on; train.py: windows anywhere in it."""
    text = README.read_text()
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    train, val = ([stoi[c] for c in part] for part in (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]))
    found = prepare([str(README)], tmp_path / "data", seq=31)
    assert found.vocab == len(stoi) and found.validation
    assert (found.train.count, found.validation.count) == (len(train), len(val))
    assert np.fromfile(tmp_path / "data/tokens.bin", "<u2").tolist() == train + val
    pairs = [pair for row in all_rows(found.validation) for pair in row]
    assert pairs == [*pairwise(val)]
    windows = {tuple(train[i : i + 32]) for i in range(len(train) - 31)}
    starts = set[tuple[int, ...]]()
    for step in range(20):
        batch = found.train.batch(5, step, 6)
        assert batch.first is None and batch.tokens.dtype == batch.targets.dtype == np.int32
        rows = {(*row, last) for row, last in zip(map(tuple, batch.tokens), batch.targets[:, -1], strict=True)}
        assert rows <= windows and (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
        starts |= rows
    assert len(starts) > 115


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    """Not on the process, on what was read before, or on how many rows there are."""
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in corpus()[2:200]))
    for pack, path in ((False, README), (True, tmp_path / "lines.jsonl")):
        make = partial(prepare, [str(path)], tokenizer=bpe(), seq=20, pack=pack)
        first, second = (make(tmp_path / f"{pack}{i}").train for i in range(2))
        batches = [first.batch(3, step, 4) for step in range(9)]
        for step in (8, 2, 5):
            np.testing.assert_equal(batches[step], second.batch(3, step, 4))
        more, fewer = first.batch(3, 0, 9), first.batch(3, 0, 2)
        assert np.array_equal(more.tokens[:4], batches[0].tokens) and np.array_equal(more.tokens[:2], fewer.tokens)
        others = [first.batch(seed, step, 4).tokens for seed, step in ((3, 1), (4, 0), (2**40 + 3, 0))]
        assert not any(np.array_equal(batches[0].tokens, other) for other in others)


@cache
def smollm2() -> Tokenizer:
    with checkpoint(default_model()) as found:
        assert found.tokenizer
        return found.tokenizer


@cache
def bpe() -> Tokenizer:
    return train_bpe(corpus(), 500)


@pytest.mark.parametrize("written", ["as it is", "in one line", "with CRLF", "in one record"])
@pytest.mark.parametrize(
    "make",
    [bpe, smollm2, lambda: train_sentencepiece(corpus()[:2], 600), lambda: characters_tokenizer("\r" + characters())],
    ids=["bpe", "smollm2", "sentencepiece", "chars"],
)
def test_a_text_in_blocks_is_encoded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, written: str
) -> None:
    """Between BOS, where the tokenizer puts it first, and EOS."""
    monkeypatch.setattr(corpora, "BLOCK", 300)
    monkeypatch.setattr(parts, "BLOCK", 300)
    tokenizer: Tokenizer = make()
    text, path = (ROOT / "lovely_llama.py").read_text(), tmp_path / "text.txt"
    text = text.replace("\n", {"in one line": " ", "with CRLF": "\r\n"}.get(written, "\n"))
    if written == "in one record":
        path = tmp_path / "text.jsonl"
    path.write_bytes((json.dumps({"text": text}) if path.suffix == ".jsonl" else text).encode())
    found = prepare([str(path)], tmp_path / "data", tokenizer=tokenizer, seq=50, fraction=0.0)
    want = tokenizer.begin(text)
    want += [] if tokenizer.eos is None else [tokenizer.eos]
    assert np.fromfile(tmp_path / "data/tokens.bin", "<u2").tolist() == want and found.validation is None


def test_a_long_line_takes_memory_by_the_block(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the sky is blue and " * 200_000)
    tracemalloc.start()
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", seq=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 4_000_000


@pytest.mark.parametrize("tokenizer", ["bpe", bpe])
def test_a_text_that_nothing_divides_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """To learn from, or to tokenize: neither could be done by the block."""
    (tmp_path / "text.txt").write_text("skyisblue" * 600_000)
    given = tokenizer if isinstance(tokenizer, str) else tokenizer()
    tracemalloc.start()
    with pytest.raises(LlamaError, match=r"text: got \d+ characters (in one|without a) \w+, expected at most"):
        prepare([str(tmp_path / "text.txt")], tmp_path / "data", tokenizer=given, vocab=500, seq=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


def characters() -> str:
    return "".join(sorted({*(ROOT / "lovely_llama.py").read_text()}))


def test_a_separator_divides_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the newlines around it; also across blocks. Every part, and every file, is a document of its own."""
    stories = ["Once\nupon a time", "there was\n\na sky", "a <s>b</s>", "The end."]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("\n<|endoftext|>\n".join([*stories, ""]))
    (tmp_path / "texts/b.txt").write_text("<|endoftext|>".join(reversed(stories)))
    (tmp_path / "texts/c.txt").touch()
    want = [[2, *bpe().encode(text, False), 3] for text in [*stories, *reversed(stories)]]
    for block in (1, 20, 2**20):
        monkeypatch.setattr(corpora, "BLOCK", block)
        folder = tmp_path / f"data{block}"
        found = prepare([str(tmp_path / "texts")], folder, tokenizer=bpe(), seq=40, fraction=0.0, pack=True)
        starts = np.fromfile(folder / "documents.bin", "<u8").tolist()
        assert [ids.tolist() for ids in np.split(np.fromfile(folder / "tokens.bin", "<u2"), starts)][1:] == want
        assert sum(len(row) for row in all_rows(found.train)) == sum(len(ids) - 1 for ids in want)


@pytest.mark.parametrize("last", [b"odd", np.full(99, 9, "<u2").tobytes()])
def test_a_failed_start_leaves_no_file_open(tmp_path: Path, last: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(np.arange(99, dtype="<u2").tobytes())
    (tmp_path / "b.bin").write_bytes(last)
    opened = list[int]()
    for _ in range(50):
        with pytest.raises(LlamaError):
            prepare([str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], tmp_path / "data", vocab=99, seq=999)
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[-1] <= opened[0]


def test_without_paths_it_is_the_standard_library(tmp_path: Path) -> None:
    found = prepare([], tmp_path / "data", seq=64)
    assert found.tokenizer and 50 < found.vocab < 129 and found.train.count > 2**20
    assert "import " in found.tokenizer.decode(found.train.batch(0, 0, 64).tokens.ravel().tolist())


# ---- What is kept in the folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_tokens_that_are_there_are_used_again(tmp_path: Path, kind: str) -> None:
    """From the same texts only; and as a corpus of their own, with their tokenizer."""
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("the sky is blue and so is the sea\n" * 40)
    make = partial(prepare, [str(text)], folder, tokenizer=kind, vocab={"bpe": 270}.get(kind), seq=9)
    before = make()
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix == ".bin"}
    again, other = make(), prepare([str(folder)], tmp_path / "unused", seq=9)
    assert times and times == {path: path.stat().st_mtime_ns for path in times}
    assert before.fingerprints == again.fingerprints == other.fingerprints
    assert before.fingerprints.keys() == {"data", "tokenizer"}
    assert [before.vocab] * 2 == [again.vocab, other.vocab] and not (tmp_path / "unused").exists()
    for found in (again, other):
        assert np.array_equal(before.train.batch(1, 2, 3).tokens, found.train.batch(1, 2, 3).tokens)
        assert found.tokenizer and found.tokenizer.decode(found.train.batch(1, 2, 3).tokens[0].tolist())
    text.write_text(text.read_text().replace("blue", "grey"))
    with pytest.raises(LlamaError, match=r"data.json: sources: got [0-9a-f]{64}, expected [0-9a-f]{64}, or an empty"):
        make()
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_failure_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("the sky is blue and so is the sea\n" * 40)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lovely_llama_tools.data.token_files.publish", full)
        with pytest.raises(LlamaError, match="path: got No space left on device"):
            prepare([str(text)], folder, seq=9)
    assert not [path for path in folder.iterdir() if "part" in path.name or path.suffix == ".bin"]
    (folder / ".tokens.bin.part1").write_bytes(b"of a process that was killed")
    with pytest.raises(LlamaError, match="tokens: got 1224 for training, expected at least 2001"):
        prepare([str(text)], folder, seq=2000)
    assert prepare([str(text)], folder, seq=9).train.count == 1224
    assert not [path for path in folder.iterdir() if "part" in path.name]


# ---- Token files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.bin", "<u2"), ("a.npy", "<u2"), ("a.npy", "<i8"), ("a.npy", ">u4"), ("a.npy", "<i4")]
)
def test_token_files(tmp_path: Path, name: str, dtype: str) -> None:
    """As nanoGPT and llama2.c write them, and numpy; several are read as one sequence, across their borders too."""
    ids = np.random.default_rng(0).integers(0, 300, 1000)
    for i, part in enumerate(np.split(ids, [300, 301, 650])):
        path = (tmp_path / str(i)).with_suffix(Path(name).suffix)
        np.save(path, part.astype(dtype)) if path.suffix == ".npy" else part.astype(dtype).tofile(path)
    found = prepare([str(tmp_path)], tmp_path / "unused", vocab=300, seq=64, fraction=0.25)
    assert (found.train.count, found.vocab, found.tokenizer) == (750, 300, None) and found.validation
    assert found.fingerprints.keys() == {"data"} and not (tmp_path / "unused").exists()
    assert [pair for row in all_rows(found.validation) for pair in row] == [*pairwise(ids[750:])]
    windows = {tuple(ids[i : i + 64]) for i in range(750 - 64)}
    assert {tuple(row) for step in range(9) for row in found.train.batch(0, step, 9).tokens} <= windows


def test_a_larger_vocabulary_has_wider_ids(tmp_path: Path) -> None:
    np.arange(65000, 66000, dtype="<u4").tofile(tmp_path / "a.bin")
    batch = prepare([str(tmp_path / "a.bin")], tmp_path, vocab=66000, seq=500, fraction=0.0).train.batch(0, 0, 8)
    assert batch.tokens.max() > 65536 and (batch.targets == batch.tokens + 1).all()


def test_documents_in_token_files_begin_at_bos(tmp_path: Path) -> None:
    """As llama2.c writes its stories; where the tokenizer puts none first, they end with EOS."""
    plain = characters_tokenizer(ALPHABET)._replace(specials={"a": 1, "b": 2})
    ids = np.array([1, 5, 6, 1, 7, 8, 9, 2, 1, 4, 2, 9, 9], np.uint16)
    ids.tofile(tmp_path / "a.bin")
    want = {True: ["1 5 6", "1 7 8 9 2", "1 4 2 9 9"], False: ["1 5 6 1 7 8 9 2", "1 4 2", "9 9"]}
    for adds_bos in (True, False):
        tokenizer = with_ends(plain, 1, 2, adds_bos, "")
        found = prepare([str(tmp_path / "a.bin")], tmp_path, tokenizer=tokenizer, seq=8, fraction=0.0, pack=True)
        assert sorted(documents_of(found, len(all_rows(found.train, 1)))) == sorted(want[adds_bos])


# ---- Documents side by side ------------------------------------------------------------------------------------------


def documents_of(found: Corpus, rows: int, steps: int = 1, seed: int = 0) -> list[str]:
    """The documents in packed batches, or the pieces of long ones, as `first` and the targets show them."""
    seen = list[str]()
    for step in range(steps):
        batch = found.train.batch(seed, step, rows)
        assert batch.first is not None
        for tokens, targets, first in zip(batch.tokens, batch.targets, batch.first, strict=True):
            assert (first <= np.arange(len(first))).all() and (first[first] == first).all()
            for begin in np.unique(first[targets >= 0]):
                place = np.flatnonzero((first == begin) & (targets >= 0))
                assert (np.diff(place) == 1).all() and place[0] == begin
                assert (tokens[place][1:] == targets[place][:-1]).all()
                seen.append(" ".join(map(str, [*tokens[place], targets[place][-1]])))
    return seen


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_each_document_is_there_once_an_epoch(tmp_path: Path) -> None:
    """In another order in each, also where a batch holds the end of one epoch and the beginning of the next."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice([*"abcdefgh"], rng.integers(2, 40))) for _ in range(60)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    tokenizer = characters_tokenizer(ALPHABET)
    found = prepare([str(path)], tmp_path / "data", tokenizer=tokenizer, seq=16, fraction=0.0, pack=True)
    pieces = [text[i : i + 17] for text in texts for i in range(0, len(text) - 1, 16)]  # each begins with a last target
    want = Counter(" ".join(map(str, tokenizer.encode(piece, False))) for piece in pieces)
    count = len(all_rows(found.train, 1))
    assert count <= 1.03 * np.ceil(sum(len(piece) - 1 for piece in pieces) / 16)  # nearly full
    rows = next(n for n in range(5, 20) if count % n)
    every = documents_of(found, rows, steps=count)
    epoch = len(pieces)
    for i in range(rows):
        assert Counter(every[i * epoch : (i + 1) * epoch]) == want
    assert every[:epoch] != every[epoch : 2 * epoch]
    assert documents_of(found, count, seed=1) != documents_of(found, count)


def test_the_last_documents_are_for_validation(tmp_path: Path) -> None:
    texts = [f"{letter}{letter * i}" for i, letter in enumerate("bcdefghijk", 1)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    make = partial(prepare, [str(path)], tokenizer=characters_tokenizer(ALPHABET), seq=16, pack=True)
    for fraction, last in ((0.05, 1), (0.1, 1), (0.25, 3), (0.999, 9)):
        found = make(tmp_path / str(fraction), fraction=fraction)
        splits = [{ALPHABET[token] for row in all_rows(split) for token, _ in row} for split in filter(None, found[:2])]
        assert splits == [{*"bcdefghijk"[:-last]}, {*"bcdefghijk"[-last:]}]


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    """Where one is changed, the logits of the others keep their bits; and all losses are those of each alone."""
    params, letters, seq = random_params(SMALL), ALPHABET[: SMALL.vocab], 40
    rng = np.random.default_rng(2)
    texts = ["".join(rng.choice([*letters], n)) for n in (30, 11, 25, 16, 9, 31, 12, 20)]
    score = jit(partial(logits, config=SMALL))

    def batch_of(name: str, texts: list[str]) -> Batch:
        path = write_lines(tmp_path / f"{name}.jsonl", texts)
        tokenizer = characters_tokenizer(letters)
        found = prepare([str(path)], tmp_path / name, tokenizer=tokenizer, seq=seq, fraction=0.0, pack=True)
        return next(iter(found.train.sweep(5)))

    batch, changed = batch_of("a", texts), batch_of("b", [*texts[:3], texts[3][::-1], *texts[4:]])
    assert batch.first is not None
    compared = 0
    for tokens, others, first in zip(batch.tokens, changed.tokens, batch.first, strict=True):
        same = np.isin(first, first[tokens != others], invert=True)
        if same.all() or not same.any():
            continue
        a, b = (np.asarray(score(params, row, first=jnp.asarray(first))) for row in (tokens, others))
        assert np.array_equal(a[same], b[same]) and not np.array_equal(a[~same], b[~same])
        compared += 1
    assert compared == 1
    counted = (batch.targets >= 0).sum()
    mean = jit(partial(loss, config=SMALL))(params, batch.tokens, batch.targets, first=batch.first)
    solo = 0.0
    encode = characters_tokenizer(letters).encode
    for text in texts:
        ids = np.full((1, seq), -1)
        ids[0, : len(text)] = encode(text, False)
        alone = jit(partial(loss, config=SMALL))(params, np.maximum(ids[:, :-1], 0), ids[:, 1:])
        solo += float(alone) * (len(text) - 1)
    assert counted == sum(len(text) - 1 for text in texts)
    assert abs(float(mean) * counted - solo) < 1e-6 * solo


# ---- Conversations ---------------------------------------------------------------------------------------------------

GENERATION = {
    "chatml": """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}
{%- endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama 3": """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}
{{- m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}""",
}
TALKS = [
    [*MESSAGES[:2], {"role": "assistant", "content": "Rayleigh: é 日本"}],
    [*MESSAGES[1:], {"role": "assistant", "content": "x <|im_end|> y <|eot_id|>"}],
    [{"role": "assistant", "content": "Hello"}, MESSAGES[3], {"role": "assistant", "content": ""}, MESSAGES[1]],
]


def talking(folder: Path, template: str) -> Tokenizer:
    """A tokenizer with a template, also in a folder."""
    for file, content in tokenizer_files(tokenizer_with("<s>", "</s>")._replace(template=template)).items():
        (folder / file).write_bytes(content)
    tokenizer = folder_tokenizer(folder)
    assert tokenizer
    return tokenizer


def write_talks(path: Path, talks: list[Any]) -> list[str]:
    """As objects and as bare lists, with empty lines between."""
    lines = [json.dumps({"messages": talk, "id": 3} if i % 2 else talk) for i, talk in enumerate(talks)]
    path.write_text("\n\n".join(lines))
    return [str(path)]


@pytest.mark.parametrize("name", GENERATION)
@pytest.mark.parametrize("pack", [False, True])
def test_targets_are_the_answers_alone(tmp_path: Path, name: str, pack: bool) -> None:
    """Those that transformers marks, where a template says what is generated."""
    tokenizer, reference = talking(tmp_path, GENERATION[name]), AutoTokenizer.from_pretrained(tmp_path)
    plain = [talk for talk in TALKS if not any("<|" in message["content"] for message in talk)]
    found = prepare(
        write_talks(tmp_path / "talks.jsonl", plain),
        tmp_path / "data",
        tokenizer=tokenizer,
        seq=200,
        fraction=0.0,
        pack=pack,
    )
    marked = [
        reference.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True) for talk in plain
    ]
    want = [
        [(ids[i], ids[i + 1]) for i in range(len(ids) - 1) if mask[i + 1]]
        for ids, mask in ((talk["input_ids"], talk["assistant_masks"]) for talk in marked)
    ]
    rows = all_rows(found.train)
    assert sorted(pair for row in rows for pair in row) == sorted(pair for talk in want for pair in talk)
    assert pack or rows == want
    assert (found.train.batch(0, 0, 1).first is not None) == pack


def test_a_message_is_text_and_a_long_conversation_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    tokenizer = talking(tmp_path, GENERATION["chatml"])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, False)

    paths = write_talks(tmp_path / "talks.jsonl", TALKS)
    found = prepare(paths, tmp_path / "data", tokenizer=tokenizer, seq=200, fraction=0.0)
    ends = tokenizer.specials["<|im_end|>"]
    answers = [[target for _, target in row] for row in all_rows(found.train)]
    want = [["Rayleigh: é 日本"], ["é 日本 ", "x <|im_end|> y <|eot_id|>"], ["Hello", ""]]
    assert answers == [[token for text in talk for token in [*encode(text), ends]] for talk in want]
    assert not capsys.readouterr().err
    short = prepare(paths, tmp_path / "data", tokenizer=tokenizer, seq=20, fraction=0.0)
    assert [[target for _, target in row] for row in all_rows(short.train)] == [[*encode("Hello"), ends]]
    assert capsys.readouterr().err == "note: no answer in the first 20 tokens of 2 conversations\n"


MERGING = (
    "{% for m in messages %}{{ m.role ~ m.content }}{% if loop.last or loop.nextitem.role != m.role %}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (("user", "assistant", "assistant"), "messages: got two assistant messages in a row, expected"),
        (("assistant", "assistant", "user", "assistant"), "messages: got two assistant messages in a row, expected"),
        (
            ("user", "bot"),
            "got 2 of the roles 'user', 'bot', none of an assistant, expected .* roles are system, .*tool",
        ),
    ],
)
def test_roles_that_cannot_be_learned_from_are_named(tmp_path: Path, roles: tuple[str, ...], says: str) -> None:
    talks = [[{"role": role, "content": "abc"} for role in roles]]
    paths, tokenizer = write_talks(tmp_path / "talks.jsonl", talks), talking(tmp_path, MERGING)
    with pytest.raises(LlamaError, match=says):
        prepare(paths, tmp_path / "data", tokenizer=tokenizer, seq=200, fraction=0.0)


def test_texts_beside_conversations_are_learned_whole(tmp_path: Path) -> None:
    tokenizer = talking(tmp_path, GENERATION["chatml"])
    text = "The sky is blue, and so is the sea. " * 9
    (tmp_path / "a.txt").write_text(text)
    paths = [str(tmp_path / "a.txt"), *write_talks(tmp_path / "talks.jsonl", TALKS[2:])]
    found = prepare(paths, tmp_path / "data", tokenizer=tokenizer, seq=30, fraction=0.0)
    rows, ids = all_rows(found.train), [*tokenizer.encode(text, False), tokenizer.eos]
    assert [pair for row in rows[:-1] for pair in row] == [*pairwise(ids)]
    assert len(rows[0]) == 30 and len(rows[-1]) < 10


# ---- Reading ahead ---------------------------------------------------------------------------------------------------


def numbered(step: int) -> Batch:
    return Batch(np.full((1, 1), step, np.int32), np.zeros((1, 1), np.int32), None)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_batches_come_in_order_and_a_few_are_read_ahead() -> None:
    asked = list[int]()
    batches = ahead(lambda step: asked.append(step) or numbered(step), range(5, 40))
    assert next(batches).tokens[0, 0] == 5 and readers()
    assert [batch.tokens[0, 0] for batch in batches] == [*range(6, 40)]
    assert asked == [*range(5, 40)] and not readers()


def test_only_a_few_batches_are_read_before_they_are_used() -> None:
    asked, enough = list[int](), threading.Event()

    def batch(step: int) -> Batch:
        asked.append(step)
        if step == 3:
            enough.set()
        return numbered(step)

    batches = ahead(batch, range(10**9))
    next(batches)
    assert enough.wait(60)
    del batches  # as when the loop that reads ends
    gc.collect()
    assert not readers() and len(asked) < 9


def test_what_the_thread_raises_is_raised_where_batches_are_used() -> None:
    def batch(step: int) -> Batch:
        if step == 2:
            raise LlamaError("file", "tokens", 9, "fewer")
        return numbered(step)

    seen = list[int]()
    with pytest.raises(LlamaError, match="file: tokens: got 9"):
        for found in ahead(batch, range(9)):
            seen.append(int(found.tokens[0, 0]))
    assert seen == [0, 1] and not readers()


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_process_ends_though_batches_were_read_ahead(end: str) -> None:
    code = f"""
import sys, numpy as np
from lovely_llama_tools.data.batches import ahead, Batch
batches = ahead(lambda step: Batch(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), None), range(10**9))
next(batches)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == {"": 0, "sys.exit(3)": 3}.get(end, -2)
