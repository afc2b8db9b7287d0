"""Chat templates rendered in a process of its own, which ends where one takes too much time or memory.

It takes pickled templates with sets of variables from stdin, each after its size, and answers each with a line of JSON.
Nothing else of this package is imported, so that it starts soon.
"""

import contextlib
import functools
import json
import pickle
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY = 2, 2**29  # of the processor's time for one template, and bytes for the process
LENGTH = 2**20  # characters that a template may add to four times the size of what it is given


class Refusal(Exception):
    """A template has called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}` marks an answer when training; what stands within is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja2 has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.Environment:
    """jinja2's sandbox, with what transformers adds to it.

    transformers, utils/chat_template_utils.py: loop controls, the tag `generation`, `raise_exception`, `strftime_now`,
    and a `tojson` that keeps characters as they are.
    """

    def refuse(message: object) -> None:
        raise Refusal(repr(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    found: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals.update(raise_exception=refuse, strftime_now=now)
    return found


@functools.lru_cache(8)
def compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def answer(source: str, values: dict[str, Any], limit: int) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        text = compiled(source).render(values)
    except Refusal as error:
        return {"refused": str(error)[:1000]}
    except MemoryError:
        raise
    except Exception as error:  # from jinja2, or whatever the template calls
        return {"failed": f"{type(error).__name__}: {error}"[:1000]}
    return {"text": text} if len(text) <= limit else {"failed": f"more than {limit} characters"}


def main() -> None:
    """The process."""
    with contextlib.suppress(ValueError, OSError):  # where memory cannot be limited
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while size := sys.stdin.buffer.read(8):
        request = sys.stdin.buffer.read(int.from_bytes(size, "little"))
        (source, sets), said = pickle.loads(request), list[dict[str, str]]()
        for values in sets:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # whose signal ends the process
            said.append(answer(source, values, LENGTH + 4 * len(request)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
