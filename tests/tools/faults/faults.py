"""Fault injection: bad inputs, how each must end, and how it ends without the guard against it.

A case is a family of bad inputs, its variants. Each must end as the contract requires: through the API in a LlamaError
with its `.file` and `.field`; through the command line in exit status 2 (bad input), 1 (a failure while running) or 130
(Ctrl-C), with one line on stderr and no traceback; or in the defined result. A twin, the valid counterpart of the
input, must work. And each variant is run again with its guard removed: then it must fail in exactly the stated way, or
it proves nothing. The bad input is accepted, or the result is wrong, or another exception is raised, which is named.

Severity: S for silently wrong results, C for crashes, hangs and exhausted memory, M for poor messages. conftest.py
prints a summary.
"""

import contextlib
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
from soak import QUICK

from lovely_llama import LlamaError, Sampling
from lovely_llama_tools.commands import main
from lovely_llama_tools.inference.generate import generate

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 60  # seconds: the machine may be busy

# ---- Where variants happen -------------------------------------------------------------------------------------------


class Done(NamedTuple):
    status: int
    out: str
    err: str


@dataclass
class World:
    """A folder, three small models, and the command line, in this process or in a new one."""

    folder: Path
    patch: pytest.MonkeyPatch
    talker: Path  # generates letters, with 64 positions
    endless: Path  # the same, with more positions
    french: Path  # generates é
    model: Any  # the talker, loaded with every guard in its place
    removed: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list["subprocess.Popen[bytes]"])

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
        """Run a command with the tiny model."""
        return self.main(command, "abc", "--model", model or self.talker, *options, **more)

    def python(
        self, code: str, *arguments: object, stdout: Any = subprocess.PIPE, before: str = "", **environment: str
    ) -> "subprocess.Popen[bytes]":
        """Start a new process with the same guards removed."""
        code = "import sys, lovely_llama_tools.__main__ as program; from removal import remove; " + code
        code = code.replace("REMOVED", repr(dict(self.removed)))
        words = [a if isinstance(a, bytes) else str(a) for a in arguments]
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        process = subprocess.Popen(
            [*shlex.split(before), sys.executable, "-P", "-c", code, *words],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": QUICK} | environment,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def start(self, *arguments: object, **more: Any) -> "subprocess.Popen[bytes]":
        """Start the command line as a process."""
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
    """Bad input was not refused."""


class Unlike(AssertionError):
    """Bad input was refused, but not as the contract requires."""


class TooLong(BaseException):
    """It did not end in time."""


class Guard(NamedTuple):
    """The code that prevents a variant's fault, and how the variant ends without it."""

    removed: Mapping[str, str]  # see `remove`
    end: type[BaseException]
    compiled: bool = False  # whether it is part of programs, which must then be compiled again


class Variant(NamedTuple):
    act: Act
    guard: Guard


class Case(NamedTuple):
    severity: str
    what: str
    variants: Mapping[str, Variant]
    twin: Act


def unchecked(*fields: str) -> dict[str, str]:
    """Remove the checks of these fields."""
    return {"lovely_llama:check": f"lambda f, *a, **k: None if f in {fields!r} else original(f, *a, **k)"}


def guarded(
    act: Act, removed: Mapping[str, str], end: type[BaseException] = AssertionError, compiled: bool = False
) -> Variant:
    """The result is as defined, and wrong once the guard is removed."""
    return Variant(act, Guard(removed, end, compiled))


def refused(
    act: Act, field: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted, seconds: float = 5,
) -> Variant:  # fmt: skip
    """The API raises a one-line LlamaError for this field, within `seconds` of CPU time and with little memory."""

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
            assert f": {field}: got " in message and re.search(says, message), message
            assert spent < seconds and peak < 2**26, f"took {spent:.1f} s of CPU time and {peak >> 20} MiB"
        else:
            raise Accepted
        finally:
            tracemalloc.stop()

    return Variant(variant, Guard(unchecked(field) if removed is None else removed, end))


def ends(
    act: Callable[[World], Done], status: int, field: str, says: str = "", removed: Mapping[str, str] | None = None,
    end: type[BaseException] = Accepted,
) -> Variant:  # fmt: skip
    """The command line ends with this exit status, and one line on stderr that names the field."""

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
    """Each of these values for an argument of `generate` is refused, for that field."""
    return {
        f"{name}={value!r:.40}": refused(lambda w, value=value: w.generate(**{name: value}), field, end=end)
        for value in wrong
    }


def samplings(name: str, *wrong: Any, end: type[BaseException] = Accepted) -> dict[str, Variant]:
    """Each of these values for a field of Sampling is refused."""
    return {
        f"{name}={value!r}": refused(
            lambda w, value=value: w.generate(sampling=Sampling(**{name: value})), name, end=end
        )
        for value in wrong
    }


WORDS = ["hot", "nan", "inf", "-inf", "1_0", "0x1", "١", "", " 1", "1 ", "1e", "--", "1,5"]
LENIENT = {f".commands.options:{name}": "re.compile('(?s).*')" for name in ("NUMBER", "WHOLE")}
USAGE = {".commands.options:Arguments.error": "argparse.ArgumentParser.error"}


def flags(
    name: str, kind: Callable[[str], object], *texts: str, end: type[BaseException] = Accepted
) -> dict[str, Variant]:  # fmt: skip
    """Each of these texts for an option of the command line is refused: when parsed, or for its value.

    Texts that Python itself parses as numbers must not pass both; for others, argparse alone would print its usage.
    """

    def variant(text: str) -> Variant:
        def act(world: World) -> Done:
            return world.run("generate", f"--{name}", text)

        value = name.replace("-", "_")
        plain = re.fullmatch(r"-?\d{1,18}" if kind is int else r"-?\d+\.?\d*(e\d+)?", text, re.ASCII)
        try:
            kind(text if re.match(r"[^-]|-\d", text) else "")  # argparse takes -inf for an option
        except ValueError:
            return ends(act, 2, "lovely-llama generate", removed=USAGE, end=SystemExit)
        return ends(act, 2, value if plain else "lovely-llama generate", removed=LENIENT | unchecked(value), end=end)

    return {f"--{name} {text}": variant(text) for text in texts}
