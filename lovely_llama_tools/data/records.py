"""Rows of JSON as people have them: which files hold them, and the text or the conversation that each one is."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from lovely_llama import LlamaError, check

from ..formats.model import blamed_on, open_file
from ..inference.chat import as_messages
from ..strict_json import check_characters, decoder, read_value
from ..tokens.base import LARGEST
from .reading import read_blocks, read_with

JSON = (".jsonl", ".ndjson", ".json")
HEAD = 2**16  # bytes of a file that are looked at to tell what it holds
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
SPACE = re.compile(r"\s*")
KINDS = """rows with "messages"; "conversations"; "prompt" and "completion"; "instruction", "input" and "output"; or \
"text\""""
# ShareGPT's names of roles.
SPEAKERS = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
}  # fmt: skip
# Keys that would change a prompt, or what is learned, in ways that are not known here.
CHANGING = (
    "functions", "function_call", "tool_choice", "response_format", "chosen", "rejected", "image", "images", "video",
    "videos", "audio", "audios",
)  # fmt: skip


class Conversation(NamedTuple):
    """Messages, and further variables of the chat template: tools, documents."""

    messages: list[dict[str, Any]]
    values: Mapping[str, Any]


Record = str | Conversation


# ---- Files -----------------------------------------------------------------------------------------------------------


def is_records(path: Path) -> bool:
    """Whether a file holds rows of JSON. Its contents say so, under whatever name; a name that says so is believed."""
    if path.suffix.lower() in JSON:
        return True
    with open_file(path, text=True) as file:
        head = file.read(HEAD)
    return begins_row(head)


def begins_row(head: bytes) -> bool:
    """Whether a file that begins so holds an object in JSON, by itself on a line or in an array."""
    text = head.removeprefix(MARK).decode(errors="replace")
    if not (found := re.match(r"\s*(\[\s*)?(?=\{)", text)):
        return False
    try:
        value, end = json.JSONDecoder().raw_decode(text, found.end())
    except (ValueError, RecursionError):
        return len(head) == HEAD and re.match(r'\{\s*"', text[found.end() :]) is not None
    return isinstance(value, dict) and re.match(r"\s*[,\]]" if found[1] else r"[ \t\r]*(\n|$)", text[end:]) is not None


def is_array(path: Path) -> bool:
    """Whether a file is one array, rather than a value on every line: a list on a line may be one of messages."""
    with open_file(path, text=True) as file:
        text = file.read(HEAD).removeprefix(MARK).decode(errors="replace").lstrip()
    return text.startswith("[") and re.match(r'\[\s*\{\s*"(role|from)"', text) is None


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a file, each with the place where it stands."""
    if is_array(path):
        yield from read_array(path)
        return
    for number, line in enumerate(read_with(path, lambda file: file.readline(LARGEST + 1)), 1):
        where, line = f"{path}:{number}", line.removeprefix(MARK) if number == 1 else line
        check("line", f"more than {LARGEST} bytes", len(line) <= LARGEST, "shorter rows", where)
        if line.strip():
            yield where, read_value(line.rstrip(), where, lines=True)


def read_array(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, one at a time."""
    cursor, number = Cursor(path), 0
    cursor.take("[")
    more = cursor.peek() != "]"
    while more:
        number += 1
        where = f"{path}, row {number}"
        yield where, cursor.value(where)
        more = cursor.peek() != "]"
        if more:
            cursor.take(",")
    cursor.take("]")
    if cursor.peek():
        raise cursor.refusal("more after the array")


class Cursor:
    """A place in a text of JSON that is read in blocks."""

    def __init__(self, path: Path) -> None:
        self.path, self.blocks = path, read_blocks(path)
        self.text, self.at = "", 0
        self.line, self.column = 1, 0  # where the text begins in the file

    def read(self) -> bool:
        """Read on, past what has been used; whether there was more."""
        more = next(self.blocks, "")
        self.line, self.column = self.place()
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character after white space; none at the end."""
        while True:
            self.at = cast(re.Match[str], SPACE.match(self.text, self.at)).end()
            if self.at < len(self.text) or not self.read():
                return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> None:
        """Pass over a mark, which must be there."""
        found = self.peek()
        if found != mark:
            raise self.refusal(f"{found!r} in place of {mark!r}" if found else "an array that does not end")
        self.at += 1

    def value(self, where: str) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                found, end = decoder(where).raw_decode(self.text, self.at)
                check_characters(self.text[self.at : end], found)
                self.at = end
                return found
            except json.JSONDecodeError as error:
                at = error.pos - self.at
                if len(self.text) - self.at > LARGEST or not self.read():
                    self.at += at
                    raise self.refusal(error.msg.removesuffix(" at")) from error
            except UnicodeError as error:
                raise self.refusal("bytes that are not UTF-8") from error
            except RecursionError as error:
                raise self.refusal("values nested too deep") from error

    def refusal(self, got: str) -> LlamaError:
        """An error at this place."""
        line, column = self.place()
        expected = "an array of objects in JSON"
        return LlamaError(f"{self.path}:{line}", "JSON", f"{got} at column {column + 1}", expected)

    def place(self) -> tuple[int, int]:
        """The line, and the column from 0."""
        newline = self.text.rfind("\n", 0, self.at)
        column = self.at - newline - 1 if newline >= 0 else self.column + self.at
        return self.line + self.text.count("\n", 0, self.at), column


# ---- Rows ------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The rows of a file, each with the place where it stands."""
    for where, value in read_rows(path):
        with blamed_on(where):
            yield where, as_record(value)


def as_record(value: Any) -> Record:
    """What a row is, by its keys. Others are passed over, unless they would change the prompt."""
    good = isinstance(value, dict | list)
    check("JSON", f"a value of type {type(value).__name__}", good, "an object or a list", "row")
    given = cast(dict[str, Any], value if isinstance(value, dict) else {"messages": value})
    row = {key: part for key, part in given.items() if part is not None}
    if "messages" in row:
        messages = as_messages(row["messages"])
    elif "conversations" in row:
        messages = as_messages(spoken(row["conversations"]))
    elif {"prompt", "completion"} <= row.keys():
        parts = ((row["prompt"], "user"), (row["completion"], "assistant"))
        messages = as_messages([message for part, role in parts for message in said(part, role)])
    elif {"instruction", "output"} <= row.keys():
        asked = [text(row, name) for name in ("instruction", "input") if row.get(name)]
        turns = [message for pair in pairs_of(row.get("history", [])) for message in exchange(*pair)]
        messages = as_messages([*turns, *exchange("\n\n".join(asked), row["output"])])
    elif "text" in row:
        return text(row, "text")
    else:
        raise LlamaError("row", "keys", ", ".join(row) or "none", KINDS)
    for key in CHANGING:
        check(key, f"{row.get(key)!r:.40}", not row.get(key), "a row without it", "row")
    if system := row.get("system"):
        twice = messages[0]["role"] == "system"
        check("system", "one beside messages that have one", not twice, "one system message", "row")
        messages = as_messages([{"role": "system", "content": system}, *messages])
    return Conversation(messages, variables(row))


def text(row: Mapping[str, Any], name: str) -> str:
    """A text in a row."""
    found = row[name]
    check(name, f"a value of type {type(found).__name__}", isinstance(found, str), "a text", "row")
    return found


def said(part: Any, role: str) -> list[Any]:
    """A prompt or a completion: a text, or messages."""
    return cast(list[Any], part) if isinstance(part, list) else [{"role": role, "content": part}]


def exchange(asked: Any, answered: Any) -> list[dict[str, Any]]:
    """A question, and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def pairs_of(history: Any) -> list[Any]:
    """Earlier questions with their answers, as LLaMA-Factory's rows have them beside an instruction."""
    pairs = cast(list[Any], history) if isinstance(history, list) else [None]
    good = all(isinstance(pair, list) and len(cast(list[Any], pair)) == 2 for pair in pairs)
    check("history", f"{history!r:.40}", good, "pairs of a question and an answer", "row")
    return pairs


def spoken(turns: Any) -> Any:
    """ShareGPT's turns as messages; those that are messages stay as they are."""
    if not isinstance(turns, list):
        return turns
    return [speech(turn) for turn in cast(list[Any], turns)]


def speech(turn: object) -> object:
    """A turn of ShareGPT."""
    given = cast(dict[str, Any], turn) if isinstance(turn, dict) else {}
    if "from" not in given:
        return cast(object, turn)
    known = isinstance(given["from"], str) and given["from"] in SPEAKERS
    check("from", f"{given['from']!r:.40}", known, f"one of {', '.join(SPEAKERS)}", "row")
    others = {key: part for key, part in given.items() if key not in ("from", "value")}
    return {"role": SPEAKERS[given["from"]], "content": given.get("value"), **others}


def variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to the template besides its messages. Tools may be written as JSON within a text."""
    found = {key: row[key] for key in ("tools", "documents") if row.get(key)}
    for key, value in found.items():
        value = read_value(value.encode(), "row") if isinstance(value, str) else value
        check(key, f"a value of type {type(value).__name__}", isinstance(value, list), "a list", "row")
        found[key] = value
    more: Any = row.get("chat_template_kwargs", {})
    check("chat_template_kwargs", f"{more!r:.40}", isinstance(more, dict), "an object", "row")
    return {**found, **cast(dict[str, Any], more)}


def texts_of(record: Record) -> Sequence[str]:
    """What is written in a row, without the names of its keys."""
    return [record] if isinstance(record, str) else [message.get("content") or "" for message in record.messages]
