"""JSON without what Python's own lets pass: duplicate keys, NaN, infinities, numbers of any length, any depth."""

import json
import math
import re
from collections import Counter
from typing import Any, cast

from lovely_llama import LlamaError, check

DIGITS = 40  # of a whole number; transformers itself writes 10³⁰ for "no limit"


def to_json(value: Any, **form: Any) -> str:
    """A value as JSON that `read_json` accepts, in the form that `json.dumps` is asked for. NaN and ∞ are refused."""
    try:
        return json.dumps(value, allow_nan=False, **form)
    except ValueError as error:
        raise ArithmeticError(f"JSON: got NaN or ∞ in {value!r:.80}, expected finite numbers") from error


def nulled(value: Any) -> Any:
    """Measured values with None, JSON's null, in place of NaN and ∞."""
    if isinstance(value, dict):
        return {key: nulled(part) for key, part in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [nulled(part) for part in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(data: bytes, file: object, lines: bool = False) -> dict[str, Any]:
    """The object that a file holds, RFC 8259: UTF-8 without a byte order mark, each key once, finite numbers.

    Of a file of JSON lines it is one of them, whose number the caller says.
    """
    found = read_value(data, file, lines)
    check("JSON", f"a value of type {type(found).__name__}", isinstance(found, dict), "an object", file)
    return found


def decoder(file: object) -> json.JSONDecoder:
    """What decodes a value of a file, and refuses what is not strict."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            twice, times = Counter(key for key, _ in items).most_common(1)[0]
            check(twice, f"{times} values", False, "one", file)
        return found

    def whole(digits: str) -> int:
        check("JSON", f"a number of {len(digits)} digits", len(digits) <= DIGITS, f"at most {DIGITS}", file)
        return int(digits)

    def decimal(digits: str) -> float:
        number = float(digits)
        check("JSON", digits[:DIGITS], abs(number) < float("inf"), "a number within float64", file)
        return number

    def constant(name: str) -> Any:
        raise LlamaError(file, "JSON", name, "a number")

    return json.JSONDecoder(object_pairs_hook=pairs, parse_int=whole, parse_float=decimal, parse_constant=constant)


def check_characters(text: str, value: Any) -> None:
    """Refuse half characters in what a text was decoded to: an escape may be one."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()


def read_value(data: bytes, file: object, lines: bool = False) -> Any:
    """As `read_json`, a value of any type."""
    try:
        text = data.decode()
        check("JSON", "a byte order mark", not text.startswith("\ufeff"), "UTF-8 without one", file)
        found: Any = decoder(file).decode(text)
        check_characters(text, found)
    except UnicodeError as error:
        raise LlamaError(file, "JSON", "bytes that are not UTF-8", "UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if lines else f"line {error.lineno}, column {error.colno}"
        where = f"{error.msg.removesuffix(' at')} at {place}"
        raise LlamaError(file, "JSON", "no bytes" if not data else where, "an object in JSON") from error
    except RecursionError as error:
        raise LlamaError(file, "JSON", "values nested too deep", "an object in JSON") from error
    return found
