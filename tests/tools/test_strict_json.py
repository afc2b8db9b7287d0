"""Strict JSON: equal to Python's parser where both accept, and one line where only Python's does."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lovely_llama import LlamaError
from lovely_llama_tools.commands import main
from lovely_llama_tools.strict_json import nulled, read_json, to_json

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(value=st.dictionaries(st.text(), VALUES, max_size=4), escape=st.booleans())
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
def test_what_json_writes_is_read(value: Any, escape: bool) -> None:
    assert read_json(to_json(value, ensure_ascii=escape).encode(), "file") == value


@pytest.mark.parametrize(
    ("data", "field", "got"),
    [
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "b", "2 values"),
        (b'{"a": NaN}', "JSON", "NaN"),
        (b'{"a": [-Infinity]}', "JSON", "-Infinity"),
        (b'{"a": 1e400}', "JSON", "1e400"),
        (b'{"a": -1e400}', "JSON", "-1e400"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON", "a number of 5000 digits"),
        (b"\xef\xbb\xbf{}", "JSON", "a byte order mark"),
        (b'{"a": "\xff"}', "JSON", "bytes that are not UTF-8"),
        (b'{"a": "\\ud800"}', "JSON", "bytes that are not UTF-8"),
        (b'{"\\uDC00x": 1}', "JSON", "bytes that are not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "JSON", "values nested too deep"),
        (b'{"a":' * 100_000, "JSON", "values nested too deep"),
        (b"", "JSON", "no bytes"),
        (b"{", "JSON", "Expecting property name.* at line 1, column 2"),
        (b'{"a": 1} x', "JSON", "Extra data at line 1, column 10"),
        (b'{"a": "b\x01"}', "JSON", "Invalid control character at line 1, column 9"),
        (b"[1]", "JSON", "a value of type list"),
        (b"<html>", "JSON", "Expecting value"),
    ],
)
def test_what_is_not_strict_json_is_refused(data: bytes, field: str, got: str) -> None:
    with pytest.raises(LlamaError, match=rf"^config.json: {field}: got {got}") as caught:
        read_json(data, "config.json")
    assert (caught.value.file, caught.value.field) == ("config.json", field)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_written(value: float) -> None:
    """In a report of measured values null stands for it."""
    report = {"a": [1.5, (value, {"b": value})], "c": "NaN"}
    with pytest.raises(ArithmeticError, match="got NaN or ∞"):
        to_json(report)
    assert read_json(to_json(nulled(report)).encode(), "file") == {"a": [1.5, [None, {"b": None}]], "c": "NaN"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "' + b"a" * 143 + b'\t"}', r"Invalid control character at column 154"),
        (b'[{"role": ]', r"Expecting value at column 11"),
        (b'{"text": "a"', r"Expecting ',' delimiter at column 13"),
        (b'"a"', "a value of type str"),
    ],
)
def test_a_broken_line_has_one_place(
    line: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 16 + line + b"\n")
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:17: JSON: got {says}, expected an object")


def test_halves_that_make_a_character_are_text() -> None:
    assert read_json(rb'{"a": "\ud83d\ude00", "b": "\\ud800"}', "file") == {"a": "😀", "b": "\\ud800"}
