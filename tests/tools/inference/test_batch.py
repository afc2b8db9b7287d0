"""Many prompts at once: every row is its solo run; and the option --prompts."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import counting_model, letter_tokenizer, random_params, write_talker

from lovely_llama import Config, LlamaError, Sampling
from lovely_llama_tools import commands
from lovely_llama_tools.commands import chat as talk
from lovely_llama_tools.formats.files import load, save
from lovely_llama_tools.formats.model import Model
from lovely_llama_tools.inference import batch as batch_generate
from lovely_llama_tools.inference.batch import Batch, Continuation, generate_all
from lovely_llama_tools.inference.generate import generate

GREEDY, HOT = Sampling(temperature=0.0), Sampling(temperature=2.0, top_p=1.0)
CONFIG = Config(61, 24, 2, 2, 3, 4, 40, 400, 1e-5, 1e4, None, False)
# Control tokens, letters, a whole character, and bytes of é, 日 and 😀: many sequences of them are invalid UTF-8.
PIECES = [
    b"", b"", *(bytes([c]) for c in b"abcdefghij "), "ñ".encode(), b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5", b"\xf0",
    b"\x9f\x98", b"\x80", b"the ", b"\n", *(b"%d" % i for i in range(38)),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_params(CONFIG), letter_tokenizer(PIECES))


def alone(model: Model, prompts: Sequence[Any], *options: Any, seed: int = 0, **more: Any) -> list[Continuation]:
    """Each prompt by itself, with its own seed."""
    found = list[Continuation]()
    for i, prompt in enumerate(prompts):
        generation = generate(model, prompt, *options, seed=(seed + i) % 2**32, **more)
        parts = list(generation)
        found.append(Continuation("".join(parts) if model.tokenizer else "", generation.tokens, generation.reason))
    return found


def ragged(count: int, longest: int) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, longest, count)
    return [rng.integers(0, CONFIG.vocab, length).tolist() for length in lengths]


# ---- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, HOT, Sampling(1.3, 1.5, 20, 0.9, 0.01)], ids=["greedy", "hot", "all"])
def test_every_row_is_its_solo_run(model: Model, sampling: Sampling) -> None:
    """17 prompts, of 1 to 300 tokens, five at a time: the cache grows, rows end at different times, others follow."""
    prompts = ragged(17, 300)
    found = list(generate_all(model, prompts, 25, sampling, 7, batch=5))
    assert found == alone(model, prompts, 25, sampling, seed=7)
    assert all(len(one.tokens) == 25 and one.reason == "length" for one in found)
    assert len({tuple(one.tokens) for one in found}) == 17


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_size_of_a_batch_changes_nothing(model: Model, batch: int) -> None:
    prompts = ragged(5, 40)
    assert list(generate_all(model, prompts, 12, HOT, batch=batch)) == alone(model, prompts, 12, HOT)


def test_texts_are_in_order_though_they_end_in_another(model: Model) -> None:
    """At a stop text, and with an empty prompt among others."""
    prompts = ["abc", "", "ñ", "j", "a" * 70, "b c d"]
    stopping = alone(model, prompts, 60, HOT, stop=["a", "5"])
    assert {one.reason for one in stopping} == {"stop"}
    lengths = [len(one.tokens) for one in stopping]
    assert lengths != sorted(lengths) and len({*lengths}) > 3
    assert list(generate_all(model, prompts, 60, HOT, stop=["a", "5"], batch=4)) == stopping


def test_a_text_by_itself_is_one_prompt(model: Model) -> None:
    """Not as many as it has letters."""
    assert list(generate_all(model, "abc", 8, HOT)) == alone(model, ["abc"], 8, HOT)


def test_a_prompt_given_twice_has_two_samples(model: Model) -> None:
    """Each row has its own seed, modulo 2³². Texts may end within a character, and contain others that are invalid."""
    found = list(generate_all(model, ["j"] * 4, 30, HOT, 2**32 - 2))
    assert found == alone(model, ["j"] * 4, 30, HOT, seed=2**32 - 2)
    assert len({one.text for one in found}) == 4
    assert any("\ufffd" in one.text for one in found)


def test_nothing_new_reads_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_generate, "rows_layer", None)
    assert list(generate_all(model, ["a", "b"], 0)) == [Continuation("", [], "length")] * 2
    assert list(generate_all(model, [], 5)) == []


def test_a_stop_token_ends_its_row_alone() -> None:
    model = counting_model([b"a", b"b", b"c", b"d", b"e"], [4])
    texts = [(one.text, one.reason) for one in generate_all(model, [[1], [4], [3], [5]], 3, GREEDY)]
    assert texts == [("bc", "stop"), ("e~~", "length"), ("", "stop"), ("~~~", "length")]


def test_ids_go_in_and_come_out_without_a_tokenizer(model: Model) -> None:
    prompts, bare = ragged(4, 20), model._replace(tokenizer=None)
    found = list(generate_all(bare, prompts, 9, HOT))
    assert found == alone(bare, prompts, 9, HOT)
    assert {one.text for one in found} == {""}


def test_rows_end_at_the_context_and_leave_the_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt goes on after the others: it is read by itself, not with four idle rows."""
    sizes, step, left = list[int](), Batch.step, (1, 0, 40, 9, 20)

    def noted(batch: Batch) -> None:
        sizes.append(len(batch.rows))
        step(batch)

    monkeypatch.setattr(Batch, "step", noted)
    prompts = [[5] * (CONFIG.ctx - n) for n in left]
    found = list(generate_all(model, prompts, None, HOT))
    assert found == alone(model, prompts, None, HOT)
    assert [(len(one.tokens), one.reason) for one in found] == [(n, "context") for n in left]
    assert sizes == sorted(sizes, reverse=True) and {*sizes} == {5, 2, 1} and len(sizes) == 39


def test_only_a_batch_of_rows_has_a_cache(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, step = set[tuple[int, ...]](), Batch.step

    def noted(batch: Batch) -> None:
        step(batch)
        shapes.add(batch.cache[1].values.shape)

    monkeypatch.setattr(Batch, "step", noted)
    assert len(list(generate_all(model, [*ragged(7, 100), [5] * 300, *ragged(7, 90)], 9, HOT, batch=5))) == 15
    assert shapes == {(5, 2, 256, 4), (5, 2, 400, 4)}


def test_a_common_beginning_is_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read, enter = list[int](), Batch.enter

    def noted(batch: Batch, *args: Any) -> Any:
        logits, new = enter(batch, *args)
        read.append(new)
        return logits, new

    monkeypatch.setattr(Batch, "enter", noted)
    prompts = ["abcdefgh" * 20 + end for end in ("a", "bb", "c")]
    assert list(generate_all(model, prompts, 9, HOT, batch=2)) == alone(model, prompts, 9, HOT)
    assert read == [162, 2, 1]  # with BOS


@pytest.mark.parametrize(
    ("options", "file", "field"),
    [
        ({"prompts": ["a", "b", [61]]}, "prompts[2]", "tokens"),
        ({"prompts": ["a", "a" * 400]}, "prompts[1]", "tokens"),
        ({"prompts": ["a", "a" * 9999]}, "prompts[1]", "prompt"),
        ({"prompts": ["a", "\udc80"]}, "prompts[1]", "prompt"),
        ({"batch": 0}, "arguments", "batch"),
        ({"batch": True}, "arguments", "batch"),
        ({"seed": 2**32}, "arguments", "seed"),
        ({"max_new": 401}, "arguments", "max_new"),
        ({"stop": [""]}, "arguments", "stop"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_token(
    model: Model, options: dict[str, Any], file: str, field: str, no_type_checks: None
) -> None:
    with pytest.raises(LlamaError) as caught:
        generate_all(model, options.get("prompts", ["a"]), **{k: v for k, v in options.items() if k != "prompts"})
    assert (caught.value.file, caught.value.field) == (file, field)


def test_texts_need_a_tokenizer(model: Model) -> None:
    with pytest.raises(LlamaError) as caught:
        generate_all(model._replace(tokenizer=None), ["a"])
    assert (caught.value.file, caught.value.field) == ("model", "tokenizer")


def test_a_batch_that_does_not_fit_into_memory_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_generate, "free_memory", lambda: 2**18)
    with pytest.raises(LlamaError, match=r"^batch: memory: got 0\.0 GiB free, .* of 9 rows of 256 tokens$"):
        list(generate_all(model, ["a"] * 9, 3, batch=9))
    assert len(list(generate_all(model, ["a"] * 9, 3, batch=1))) == 9


def test_non_finite_logits_end_the_generation(model: Model) -> None:
    broken = model._replace(params=model.params._replace(norm=model.params.norm * np.float32("nan")))
    with pytest.raises(FloatingPointError, match="position 1"):
        list(generate_all(broken, ["a"], 1))


# ---- On the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("talker") / "talker.gguf")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status, (out, err) = commands.main(["generate", *map(str, arguments)]), capsys.readouterr()
    return status, out, err


def test_each_line_of_a_file_is_continued(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty ones too; lines end as on Windows, or at the file's end; other separators are part of a line."""
    file, prompts = tmp_path / "prompts", ["the", "", "é 日", "a\u2028b\x85c", "q" * 40, "the"]
    file.write_bytes("\r\n".join(prompts).encode() + b"\n")
    options = ("--model", talker, "--temperature", 1, "--max-new", 9, "--seed", 5, "--batch", 2)
    status, out, err = run(capsys, "--prompts", file, *options)
    wanted = [one.text for one in alone(load(talker), prompts, 9, Sampling(temperature=1.0), seed=5)]
    assert (status, out.split("\n")) == (0, [*wanted, ""])
    assert err.startswith("6 prompts; new 54, ") and len(err.splitlines()) == 1
    assert wanted[0] != wanted[-1]
    status, out, err = run(capsys, "--prompts", file, *options, "--json", "--quiet")
    records = [json.loads(line) for line in out.splitlines()]
    wanted = [
        {"prompt": prompt, "text": text, "reason": "length"} for prompt, text in zip(prompts, wanted, strict=True)
    ]
    assert (status, records, err) == (0, wanted, "")


def test_newlines_in_a_text_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting_model([b"a", b"\n", b"\\", b"n", b"\r", "é".encode()])
    monkeypatch.setattr(talk, "load", lambda *_, **__: model)
    (tmp_path / "prompts").write_text("a\n")
    options = ("--prompts", tmp_path / "prompts", "--model", "none", "--max-new", 5, "--temperature", 0, "--quiet")
    assert run(capsys, *options)[1] == "\\n\\\\n\\ré\n"
    assert json.loads(run(capsys, *options, "--json")[1])["text"] == "\n\\n\ré"


def test_prompts_of_ids(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without a tokenizer."""
    save(model._replace(tokenizer=None), tmp_path / "model.gguf")
    (tmp_path / "prompts").write_text("1 2 3\n4\n")
    options = ("--model", tmp_path / "model.gguf", "--max-new", 4, "--temperature", 0)
    _, out, _ = run(capsys, "--prompts", tmp_path / "prompts", *options)
    wanted = alone(model._replace(tokenizer=None), [[1, 2, 3], [4]], 4, GREEDY)
    assert out.splitlines() == [" ".join(map(str, one.tokens)) for one in wanted]


def test_lines_are_printed_as_soon_as_they_are_known(talker: Path) -> None:
    """And a reader that goes away ends the command without a word."""
    command = [sys.executable, "-m", "lovely_llama_tools", "generate", "--prompts", "-", "--model", str(talker)]
    process = subprocess.Popen(
        [*command, "--max-new", "40", "--batch", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    with process, process.stdin, process.stdout, process.stderr:
        process.stdin.write(b"the\n" * 2000)
        process.stdin.close()
        assert len(process.stdout.readline()) == 41
        assert process.poll() is None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        (b"", "prompts", "got nothing, expected a line for each prompt"),
        (b"\n", "prompts", "got nothing, expected a line for each prompt"),
        (b"the\nt\xff\n", "text", "got bytes that are not UTF-8 at byte 5"),
        (b"the\n" + b"a" * 100 + b"\nthe", "line 2", "got 100 tokens, expected 1 to 64"),
        (None, "path", "got no such file"),
    ],
)
def test_bad_prompts_are_refused(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, field: str, says: str
) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    status, out, err = run(capsys, "--prompts", file, "--model", talker)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {file}: {field}: {says}") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ((), "PROMPT", "got none, expected a text, piped input, or --prompts FILE"),
        (("the", "--prompts", "FILE"), "PROMPT", "got both a text and --prompts"),
        (("the", "--batch", "2"), "prompts", "got none"),
        (("the", "--json"), "prompts", "got none"),
        (("--prompts", "FILE", "--batch", "0"), "batch", "got 0"),
        (("--prompts", "FILE", "--seed", "-1"), "seed", "got -1"),
        (("--prompts", "DIR"), "path", "got not a regular file"),
        (("--prompts", "/dev/zero"), "path", "got not a regular file"),
    ],
)
def test_bad_options_are_refused(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], field: str, says: str
) -> None:
    (tmp_path / "prompts").write_text("the\n")
    paths = {"FILE": tmp_path / "prompts", "DIR": tmp_path}
    status, out, err = run(capsys, *(paths.get(option, option) for option in options), "--model", talker)
    assert (status, out) == (2, "")
    assert f": {field}: {says}" in err and len(err.splitlines()) == 1
