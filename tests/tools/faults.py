"""Faults: what goes wrong, what must happen then, and what happens without the guard against it.

A case is a family of wrong inputs, its variants. Each must end as the contract says: through the API in a LlamaError
with its `.file` and `.field`; through the command line in status 2 (bad input), 1 (a fault while running) or 130
(Ctrl-C), with one line on stderr and no traceback; or in what is defined. A twin, the input with nothing wrong in it,
must work. And each variant is run again with its guard removed: then it must end in just the way that is stated for
it, or it proves nothing. Either the wrong input is accepted, or the result is wrong, or some other exception comes up,
which then is named.

Severity: S a wrong result in silence, C a crash, a hang or no memory left, M a poor message. conftest.py prints the
score.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lovely_llama import LlamaError, Sampling
from lovely_llama_tools.commands import main
from lovely_llama_tools.files import load
from lovely_llama_tools.generate import generate

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds: a machine may be busy

# ---- Where variants happen -------------------------------------------------------------------------------------------


class Done(NamedTuple):
    status: int
    out: str
    err: str


@dataclass
class World:
    """A folder, three small models, and the command line, in this process or in one of its own."""

    folder: Path
    patch: pytest.MonkeyPatch
    talker: Path  # says letters, 64 positions
    endless: Path  # says them for longer
    french: Path  # says é
    removed: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list["subprocess.Popen[bytes]"])

    @functools.cached_property
    def model(self) -> Any:
        return load(self.talker)

    def generate(self, prompt: Any = "abc", **options: Any) -> Any:
        """A generation, run to its end."""
        options.setdefault("max_new", 3)
        generation: Any = generate(self.model, prompt, **options)
        generation.text = "".join(generation)
        return generation

    def main(self, *arguments: object, stdin: bytes = b"", errors: str = "strict") -> Done:
        """The command line in this process."""
        out, err = io.StringIO(), io.StringIO()
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8", errors))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
        return Done(status, out.getvalue(), err.getvalue())

    def run(self, command: str, *options: object, model: Path | None = None, **more: Any) -> Done:
        """A command with the tiny model."""
        return self.main(command, "abc", "--model", model or self.talker, *options, **more)

    def python(
        self, code: str, *arguments: object, stdout: Any = subprocess.PIPE, before: str = "", **environment: str
    ) -> "subprocess.Popen[bytes]":
        """A process of its own, with the same guards removed."""
        code = "import sys, lovely_llama_tools.__main__ as program; from removal import remove; " + code
        code = code.replace("REMOVED", repr(dict(self.removed)))
        words = [a if isinstance(a, bytes) else str(a) for a in arguments]
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        process = subprocess.Popen(
            [*shlex.split(before), sys.executable, "-P", "-c", code, *words],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths} | environment,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def start(self, *arguments: object, **more: Any) -> "subprocess.Popen[bytes]":
        """The command line as a process."""
        return self.python("remove(REMOVED); sys.exit(program.run())", *arguments, **more)

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()


# ---- What a case is made of ------------------------------------------------------------------------------------------

Act = Callable[[World], object]


class Accepted(AssertionError):
    """What should have been refused was not."""


class Unlike(AssertionError):
    """It was refused, but not as the contract says."""


class TooLong(BaseException):
    """It did not end by itself."""


class Guard(NamedTuple):
    """What stands between a variant and its fault, and how the variant ends without it."""

    removed: Mapping[str, str]  # see `remove`
    end: type[BaseException]
    compiled: bool = False  # whether it is part of compiled programs, which then must be made anew


class Variant(NamedTuple):
    act: Act
    guard: Guard


class Case(NamedTuple):
    severity: str
    what: str
    variants: Mapping[str, Variant]
    twin: Act


def unchecked(*fields: str) -> dict[str, str]:
    """No check of these fields."""
    return {"lovely_llama:check": f"lambda f, *a, **k: None if f in {fields!r} else original(f, *a, **k)"}


def guarded(
    act: Act, removed: Mapping[str, str], end: type[BaseException] = AssertionError, compiled: bool = False
) -> Variant:
    """What is defined, and a change by which the result becomes wrong."""
    return Variant(act, Guard(removed, end, compiled))


def refused(
    act: Act, field: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted, seconds: float = 5,
) -> Variant:  # fmt: skip
    """The API raises LlamaError for this field, in one line, within seconds of the processor and with little memory."""

    def variant(world: World) -> None:
        tracemalloc.start()
        began = os.times()
        try:
            act(world)
        except LlamaError as error:
            now, (_, peak) = os.times(), tracemalloc.get_traced_memory()
            spent, message = now.user + now.system - began.user - began.system, str(error)
            if error.field != field or not re.fullmatch(r"[^\n]+: [^\n]+: got [^\n]*, expected [^\n]+", message):
                raise Unlike(message) from error
            assert message.startswith(f"{error.file}: {field}: got ") and re.search(says, message), message
            assert spent < seconds and peak < 2**26, f"took {spent:.1f} s of the processor, {peak >> 20} MiB"
        else:
            raise Accepted
        finally:
            tracemalloc.stop()

    return Variant(variant, Guard(unchecked(field) if removed is None else removed, end))


def ends(
    act: Callable[[World], Done], status: int, field: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted,
) -> Variant:  # fmt: skip
    """The command line ends with this status, and one line on stderr that names the field."""

    def variant(world: World) -> None:
        done = act(world)
        if done.status == 0:
            raise Accepted
        line = rf"error: [^\n]+: {re.escape(field)}: got [^\n]*, expected [^\n]+\n"
        if done.status != status or not re.fullmatch(line, done.err):
            raise Unlike(done.err)
        assert re.search(says, done.err), done.err
        assert "Traceback" not in done.err
        assert status == 1 or not done.out

    return Variant(variant, Guard(unchecked(field) if removed is None else removed, end))


def values(name: str, field: str, *wrong: Any, end: type[BaseException] = Accepted) -> dict[str, Variant]:
    """Each of the values for an argument of `generate` is refused, as that field."""
    return {
        f"{name}={value!r:.40}": refused(lambda w, value=value: w.generate(**{name: value}), field, end=end)
        for value in wrong
    }


def samplings(name: str, *wrong: Any, end: type[BaseException] = Accepted) -> dict[str, Variant]:
    """Each of the values for a field of Sampling is refused."""
    return {
        f"{name}={value!r}": refused(
            lambda w, value=value: w.generate(sampling=Sampling(**{name: value})), name, end=end
        )
        for value in wrong
    }


WORDS = ["hot", "nan", "inf", "-inf", "1_0", "0x1", "١", "", " 1", "1 ", "1e", "--", "1,5"]
LENIENT = {"lovely_llama_tools.commands:number": "float", "lovely_llama_tools.commands:whole": "int"}
USAGE = {"lovely_llama_tools.commands:Arguments.error": "argparse.ArgumentParser.error"}


def flags(
    name: str, kind: Callable[[str], object], *texts: str, end: type[BaseException] = Accepted
) -> dict[str, Variant]:  # fmt: skip
    """Each of the texts for an option of the command line is refused: where it is read, or for its value.

    What Python itself takes for a number must not get past both; of the rest argparse complains at length.
    """

    def variant(text: str) -> Variant:
        def act(world: World) -> Done:
            return world.run("generate", f"--{name}", text)

        value = name.replace("-", "_")
        plain = re.fullmatch(r"-?\d{1,18}" if kind is int else r"-?\d+\.?\d*(e\d+)?", text, re.ASCII)
        try:
            kind(text if re.match(r"[^-]|-\d", text) else "")  # to argparse -inf is an option
        except ValueError:
            return ends(act, 2, "lovely-llama generate", removed=USAGE, end=SystemExit)
        return ends(act, 2, value if plain else "lovely-llama generate", removed=LENIENT | unchecked(value), end=end)

    return {f"--{name} {text}": variant(text) for text in texts}
