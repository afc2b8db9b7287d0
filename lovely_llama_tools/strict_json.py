"""JSON without what Python's parser lets pass: duplicate keys, NaN, infinities, numbers of any length, any depth."""

import json
import re
from collections import Counter
from typing import Any

from lovely_llama import LlamaError, check

DIGITS = 40  # of a whole number; transformers itself writes 10³⁰ for "no limit"


def read_json(data: bytes, file: object) -> dict[str, Any]:
    """The object that a file holds, RFC 8259: UTF-8 without a byte order mark, each key once, finite numbers."""

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

    try:
        text = data.decode()
        check("JSON", "a byte order mark", not text.startswith("\ufeff"), "UTF-8 without one", file)
        found: Any = json.loads(
            text, object_pairs_hook=pairs, parse_int=whole, parse_float=decimal, parse_constant=constant
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):  # an escape may be half of a character
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise LlamaError(file, "JSON", "bytes that are not UTF-8", "UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise LlamaError(file, "JSON", "no bytes" if not data else where, "an object in JSON") from error
    except RecursionError as error:
        raise LlamaError(file, "JSON", "values nested too deep", "an object in JSON") from error
    check("JSON", f"a value of type {type(found).__name__}", isinstance(found, dict), "an object", file)
    return found
