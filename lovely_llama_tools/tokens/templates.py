"""Chat templates: checked when they are read, and rendered in a process whose time and memory are bounded."""

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lovely_llama import LlamaError, check

from ..devices.processes import PATH
from ..extras import extra
from .base import check_text

LONGEST = 2**20  # characters of a template
LOCK = threading.Lock()  # over the process that renders
RENDERERS = dict[int, "subprocess.Popen[bytes]"]()  # by process id, so that a fork starts its own


def check_template(template: str, field: str, file: object) -> None:
    """Refuse a template that jinja2 cannot parse."""
    check_text(field, template)
    check(field, f"{len(template)} characters", len(template) <= LONGEST, f"at most {LONGEST}", file)
    extra("jinja2", "chat")
    from .rendering import environment

    try:
        environment().parse(template)
    except Exception as error:  # a syntax error, or nesting too deep
        raise LlamaError(file, field, "a syntax error", "a jinja2 template") from error


class Refused(LlamaError):
    """A conversation that a template does not accept, or for which it fails."""


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text of a template with these variables."""
    (found,) = render_all(source, [values])
    if isinstance(found, Refused):
        raise found
    return found


def render_all(source: str, sets: Sequence[Mapping[str, Any]]) -> list[str | Refused]:
    """The texts of a template with each of these sets of variables, or why it accepts one not."""
    extra("jinja2", "chat")
    try:
        request = pickle.dumps((source, [*map(dict, sets)]))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise LlamaError("arguments", "values", str(error), "texts, numbers, lists and dictionaries") from error
    with LOCK:
        answers = ask(request)
    found = list[str | Refused]()
    for said in answers:
        got, expected = said.get("refused"), "a conversation that the template accepts"
        got, expected = (got, expected) if got else (said.get("failed"), "one that renders")
        found.append(said.get("text", Refused("model", "chat_template", got, expected)))
    if len(found) < len(sets):  # one of them is too much for the process: each by itself
        found = [one for values in sets for one in render_all(source, [values])]
    return found


def ask(request: bytes) -> list[dict[str, str]]:
    """The renderer's answers. It is started when first needed, and after it has ended at one of its bounds."""
    here = os.getpid()
    if here not in RENDERERS:
        RENDERERS[here] = start()
    process: Any = RENDERERS[here]
    try:
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
        if said := process.stdout.readline():
            return json.loads(said)
    except BrokenPipeError:
        pass
    except BaseException:  # an interrupt: its answer would be taken for the next
        end(here)
        raise
    end(here)
    from .rendering import MEMORY, SECONDS

    return [{"failed": f"one that takes more than {SECONDS} s or {MEMORY >> 20} MiB"}]


def start() -> "subprocess.Popen[bytes]":
    """Start the process; Ctrl-C on a terminal is not for it."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("rendering.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0,
        env=os.environ | {"PYTHONPATH": PATH},
    )  # fmt: skip
    atexit.register(end, os.getpid())
    return process


def end(starter: int) -> None:
    """End the process, if it is this one's."""
    if starter == os.getpid() and (process := RENDERERS.pop(starter, None)):
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # of what it has not read
                cast(Any, pipe).close()
