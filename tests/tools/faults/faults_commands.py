"""Cases G: the command line, its streams, signals and files."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from builders import TINY, random_arrays, write_llama2c, write_sentencepiece, write_talker
from faults import (
    PATIENCE,
    USAGE,
    WORDS,
    Accepted,
    Act,
    Case,
    Done,
    TooLong,
    Unlike,
    Variant,
    World,
    ends,
    flags,
    guarded,
    refused,
    unchecked,
)

from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.layout import LLAMA2C

PROGRAM, COMMAND = "lovely-llama", "lovely-llama generate"

# ---- G1: text --------------------------------------------------------------------------------------------------------


def told(field: str, *arguments: object, removed: Mapping[str, str] | None = None, **more: Any) -> Variant:
    """These arguments, with the tiny model, are refused for this field."""
    return ends(lambda world: world.main(*arguments, "--model", world.talker), 2, field, removed=removed, **more)


NO_TEXT_CHECKED = unchecked("prompt", "system", "message", "text", "stop")
READ_PLAINLY = {".commands.chat:lines": "lambda: iter(input, '')"}


def no_text(field: str, *arguments: object, end: type[BaseException] = Unlike) -> Variant:
    """If no text is checked, a UnicodeEncodeError follows."""
    return told(field, *arguments, removed=NO_TEXT_CHECKED, end=end)


def no_path(world: World) -> Done:
    return world.main("generate", "abc", "--model", "\udce9")


def typed(line: bytes) -> Callable[[World], Done]:
    """Chat with this line on stdin."""
    return lambda world: world.main("chat", "--model", world.talker, "--max-new", 2, stdin=line)


def escaped(world: World) -> Any:
    return world.main("chat", "--model", world.talker, "--max-new", 2, stdin=b"caf\xe9\n", errors="surrogateescape")


def megabyte(command: str, field: str, text: str, end: type[BaseException] = Accepted) -> Variant:
    """A prompt longer than any context here is refused."""
    long = (text * 2**20)[: 2**20]
    return ends(lambda world: world.main(command, long, "--model", world.endless), 2, field, "8192", end=end)


def raw_argument(world: World) -> Done:
    process = world.start("generate", b"caf\xe9", "--model", world.talker)
    out, err = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, out.decode(), err.decode())


def accepts_text(world: World) -> None:
    assert world.run("generate", "--stop", "é", "--max-new", 2).status == 0


# ---- G2: stdout ------------------------------------------------------------------------------------------------------

BARE_MAIN = {".commands:main": "lambda: (args := arguments().parse_args(sys.argv[1:])).run(args) or 0"}


def finish(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    _, err = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err, err
    return process.returncode, err.decode()


def had_enough(world: World) -> None:
    """As with `| head -c 5`: the reader closes the pipe."""
    process = world.start("generate", "abc", "--model", world.endless)
    assert process.stdout
    assert process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    assert finish(process) == (0, "")


def full_disk(world: World) -> None:
    with open("/dev/full", "wb") as full:
        status, err = finish(world.start("chat", "abc", "--model", world.talker, "--max-new", 3, stdout=full))
    assert status == 1
    assert re.fullmatch(r"error: [^\n]*No space left[^\n]*\n", err)


def no_stdout(world: World) -> None:
    """As with `>&-`: stdout is closed from the start."""
    arguments = ("generate", "abc", "--model", world.talker, "--max-new", 3)
    status, err = finish(world.start(*arguments, before="/bin/sh -c 'exec \"$@\" >&-' sh"))
    assert status == 0
    assert err.startswith("prompt 3 tokens") and len(err.splitlines()) == 1


def only_ascii(world: World) -> None:
    process = world.start("generate", "é", "--model", world.french, "--max-new", 3, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert out == b"\\xe9" * 3 + b"\n"


def speaks(world: World) -> None:
    done = world.run("generate", "--max-new", 5)
    assert done.status == 0
    assert re.fullmatch("[a-h]{5}\n", done.out)
    assert world.main("generate", "é", "--model", world.french, "--max-new", 3).out == "ééé\n"


# ---- G3: Ctrl-C ------------------------------------------------------------------------------------------------------

# The process creates a file, and then stays busy: it loads over and over, or is in C code that does not return, as
# during compilation; here, in a mutex that is locked twice. The file appears once it is surely there.
LOADING = (
    "lambda *given, **how: any("
    "(original(*given, **how), __import__('pathlib').Path({mark!r}).touch())[1] for _ in iter(int, 1))"
)
IN_C = (
    "lambda *_, **__: (c := __import__('ctypes'), lock := c.CDLL(None).pthread_mutex_lock, "
    "at := c.create_string_buffer(64), lock(at), "
    "__import__('threading').Timer(1, __import__('pathlib').Path({mark!r}).touch).start(), lock(at))"
)
PYTHONS_OWN = {".__main__:leave_on_interrupt": "lambda: None"}


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C: the exit status is 130, and the terminal is on a new line."""
    assert process.poll() is None, "it ended before the interrupt"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, b"\n")


def generating(world: World) -> None:
    process = world.start("generate", "abc", "--model", world.endless)
    assert process.stdout
    assert process.stdout.read(20)
    interrupt(process)


def busy(place: str, work: str) -> Act:
    """Ctrl-C while the process is busy for ever."""

    def variant(world: World) -> None:
        mark = world.folder / "begun"
        world.removed = {**world.removed, place: work.format(mark=str(mark))}
        process = world.start("generate", "abc", "--model", world.talker)
        limit = time.monotonic() + PATIENCE
        while not mark.exists():
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.02)
        interrupt(process)

    return variant


# ---- G4, G5: files ---------------------------------------------------------------------------------------------------

BLOCKING = {".formats.model:open_file": "lambda path, *_: open(path, 'rb')"}
UNCAUGHT = {
    ".tokens.base:open_file": "lambda path, *_: __import__('sys').modules['lovely_llama_tools.tokens.base'].open(path)"
}
UNTOLD = {".formats.files:opener": "lambda path: path.is_dir() or original(path)"}
# Memory-mapped files, and arrays that are not copied.
MAPPED = {
    ".formats.model:owned": "lambda array, *_: array",
    ".formats.gguf:read_at": "lambda file, path, name, begin, kind, n: "
    "__import__('numpy').memmap(path, kind, 'r', begin, (n,))",
    ".formats.layout:jnp": "type('Bare', (), {'__getattr__': lambda _, name: (lambda array, dtype: "
    "jax.device_put(array)) if name == 'asarray' else getattr(original, name)})()",
}


def place(
    make: Callable[[Path], object], end: type[BaseException] = OSError, removed: Mapping[str, str] = BLOCKING
) -> Variant:
    """A path that is not a regular file is refused at once, by the API and by the command line."""

    def variant(world: World) -> None:
        path = world.folder / "model.gguf"
        made = make(path)
        path = made if isinstance(made, Path) else path
        for act in (lambda _: load(path), lambda _: load(str(path))):
            refused(act, "path", seconds=1).act(world)
        ends(lambda world: world.run("generate", model=path), 2, "path").act(world)

    return guarded(variant, removed, end)


def no_permission(world: World) -> None:
    """Root may read everything, so the system's error is simulated."""

    def denied(path: Path, *mode: str) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    world.patch.setattr("lovely_llama_tools.tokens.base.open", denied, raising=False)
    refused(lambda world: load(world.talker), "path", "Permission denied", seconds=1).act(world)
    ends(lambda world: world.run("generate"), 2, "path", "Permission denied").act(world)


def beside(make: Callable[[Path], object], end: type[BaseException] = OSError) -> Variant:
    """The same for the tokenizer beside a llama2.c file."""

    def act(world: World) -> None:
        model = tiny_llama2c(world.folder)
        (world.folder / "tokenizer.model").unlink()
        make(world.folder / "tokenizer.model")
        load(model)

    read = "lambda path, *_: open(path, 'rb').read() if path.exists() else None"
    plainly = {".tokens.folders:small_file": read}
    return refused(act, "path", "tokenizer.model", removed=plainly, end=end, seconds=1)


def no_tokenizer(world: World) -> Done:
    """Such a model takes ids, and says so where it is given a text."""
    model = tiny_llama2c(world.folder)
    (world.folder / "tokenizer.model").unlink()
    assert world.main("generate", "5 6", "--model", model, "--max-new", 3).status == 0
    return world.run("generate", model=model)


def tiny_llama2c(folder: Path) -> Path:
    config = replace(TINY, tied=True)
    write_sentencepiece(folder / "tokenizer.model", 44)
    arrays = {name: array / 4 for name, array in random_arrays(LLAMA2C, config, 0).items()}
    return write_llama2c(folder / "model.bin", config, arrays)


CHANGED = """
import os, numpy
from lovely_llama_tools import generate, load
path, change = sys.argv[1:]
size = os.path.getsize(path)
def text(model): return "".join(generate(model, [80, 7], 20, seed=1))
want = text(load(path))
remove(REMOVED)
model = load(path)
with open(path, "r+b") as file:
    file.truncate(0) if change == "cut" else file.write(bytes([255]) * size)
print(text(model) == want)
"""


def changed_later(change: str) -> Variant:
    """Overwriting or truncating a loaded file changes nothing. In its own process, since a bus error would kill it."""

    def act(world: World) -> None:
        process = world.python(CHANGED, write_talker(world.folder / "mine.gguf"), change)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, b"True\n"), err

    return guarded(act, MAPPED)


def loads(world: World) -> None:
    assert load(world.talker).config.ctx == TINY.ctx


# ---- G6: options -----------------------------------------------------------------------------------------------------


def complains(*arguments: object, field: str = COMMAND) -> Variant:
    """The error is one line, where argparse alone would print its usage."""
    return told(field, *arguments, removed=USAGE, end=SystemExit)


def converted(target: str, *options: str, beside: str = "") -> Callable[[World], Done]:
    """Convert the tiny model to a path, where a folder `model` is a checkpoint already, perhaps beside another file."""

    def act(world: World) -> Done:
        folder = world.folder / "model"
        assert folder.exists() or world.main("convert", world.talker, folder).status == 0
        if beside:
            (folder / beside).write_text("mine")
        world.patch.chdir(world.folder)
        return world.main("convert", world.talker, target, *options)

    return act


def taken(target: str, *options: str, says: str, end: type[BaseException] = Accepted, beside: str = "") -> Variant:
    """A place that is not replaced, or cannot be meant."""
    return ends(converted(target, *options, beside=beside), 2, "path", says, end=end)


def numbers_of_all_kinds(world: World) -> None:
    options = ["--min-p", ".5", "--top-k", "5", "--seed", "1", "--top-p", "1e-1", "--max-new", "2"]
    assert world.run("generate", *options).status == 0


# ---- The cases -------------------------------------------------------------------------------------------------------

LOAD, GENERATE = ".commands.chat:load", ".commands.chat:generate"
MAIN = "__import__('lovely_llama_tools.commands').commands.main()"
NOTHING_KEPT = {".__main__:run": f"lambda: {MAIN}"}
STRICT = {".__main__:run": f"lambda: [s.reconfigure() for s in (sys.stdout, sys.stderr)] and {MAIN}"}

CASES: dict[str, Case] = {
    "G1": Case(
        "C", "arguments that are not UTF-8, or a megabyte long",
        {
            "prompt": no_text("prompt", "generate", "caf\udce9"),
            "question": no_text("prompt", "chat", "caf\udce9"),
            "a lone surrogate": no_text("prompt", "generate", "\ud83d"),
            "system": no_text("system", "chat", "abc", "--system", "\udce9"),
            "stop": no_text("stop", "generate", "abc", "--stop", "\udce9", end=Accepted),
            "model": ends(no_path, 2, "path", removed=BLOCKING, end=Unlike),
            "as a process": ends(raw_argument, 2, "prompt", removed=NO_TEXT_CHECKED, end=Unlike),
            "typed": ends(typed(b"caf\xe9\n"), 2, "line", removed=READ_PLAINLY, end=Unlike),
            "typed, escaped": ends(escaped, 2, "message", removed=NO_TEXT_CHECKED, end=Unlike),
            "a megabyte typed": ends(typed(b"a" * 2**20 + b"\n"), 2, "tokens"),
            "a megabyte to continue": megabyte("generate", "prompt", "a", Unlike),
            **{f"a megabyte of {text!r}": megabyte("chat", "tokens", text) for text in ("a", "the ", "é", "1")},
        },
        accepts_text,
    ),
    "G2": Case(
        "C", "a stdout that is closed, full, or ASCII",
        {
            "ASCII": guarded(only_ascii, NOTHING_KEPT),
            "| head": guarded(had_enough, BARE_MAIN),
            "> /dev/full": guarded(full_disk, BARE_MAIN),
            ">&-": guarded(no_stdout, STRICT),
        },
        speaks,
    ),
    "G3": Case(
        "C", "Ctrl-C",
        {
            "generating": guarded(generating, PYTHONS_OWN),
            # A KeyboardInterrupt within a callback of a library is lost, and then the process goes on.
            "loading": guarded(busy(LOAD, LOADING), PYTHONS_OWN, end=BaseException),
            "compiling": guarded(busy(GENERATE, IN_C), PYTHONS_OWN, end=TooLong),
        },
        speaks,
    ),
    "G4": Case(
        "C", "paths that are not regular files",
        {
            "a folder": place(Path.mkdir, IndexError, removed=unchecked("path")),
            "nothing": place(lambda path: None),
            "a pipe": place(os.mkfifo, TooLong),
            "/dev/zero": place(lambda path: Path("/dev/zero"), Unlike),
            "/dev/null": place(lambda path: Path("/dev/null"), Unlike),
            "a link to itself": place(lambda path: path.symlink_to(path)),
            "a link to nothing": place(lambda path: path.symlink_to("nowhere")),
            "a link to a pipe": place(lambda path: (os.mkfifo(f"{path}2"), path.symlink_to(f"{path}2"))[1], TooLong),
            "below a file": place(lambda path: (path.write_text(""), path / "model.gguf")[1]),
            "NUL": place(lambda path: path / "a\0b", ValueError),
            "a long name": place(lambda path: path / ("a" * 9999), removed=UNTOLD),
            "no permission": guarded(no_permission, UNCAUGHT, end=OSError),
            "no tokenizer": ends(no_tokenizer, 2, "tokenizer", "tokenizer.json", end=Unlike),
            "a folder for a tokenizer": beside(Path.mkdir),
            "a pipe for a tokenizer": beside(os.mkfifo, TooLong),
            "a link to nothing for a tokenizer": beside(lambda path: path.symlink_to("nowhere"), Accepted),
        },
        loads,
    ),
    "G5": Case(
        "C", "a file that is changed once it is loaded",
        {"overwritten": changed_later("overwritten"), "truncated": changed_later("cut")},
        loads,
    ),
    "G6": Case(
        "M", "unknown options and invalid numbers",
        {
            "an unknown option": complains("generate", "abc", "--warmth", "2", field=PROGRAM),
            "an unknown short option": complains("generate", "abc", "-t", "2", field=PROGRAM),
            "an abbreviated option": complains("generate", "abc", "--temp", "0", field=PROGRAM),
            "an unknown command": complains("shout", "abc", field=PROGRAM),
            "no prompt": ends(lambda w: w.main("generate", "--model", w.talker), 2, "PROMPT"),
            "two prompts": complains("generate", "abc", "def", field=PROGRAM),
            "an option without a value": complains("generate", "abc", "--seed"),
            "an empty stop": told("stop", "generate", "abc", "--stop", ""),
            "a system message outside a chat": complains("generate", "abc", "--system", "be kind", field=PROGRAM),
            "a newline in an option": complains("generate", "abc", "--a\nb", field=PROGRAM),
            "a model's folder to write to": taken("model", says="a new one, or --force"),
            "one with other files": taken("model", "--force", says="a folder with notes.txt", beside="notes.txt"),
            "the current folder": taken(".", "--force", says="the current folder", end=Unlike),
            "the one above it": taken("..", "--force", says="the name of a new|another place", end=Unlike),
            "an unknown suffix": taken("model.xyz", says="the suffix .xyz, expected .gguf"),
            "an unknown field to drop": ends(converted("new", "--drop", "warmth"), 2, "drop", "expected tokenizer"),
            **flags("min-p", float, *WORDS), **flags("repetition-penalty", float, *WORDS),
            **flags("repetition-penalty", float, "nan", end=Unlike),
        },
        numbers_of_all_kinds,
    ),
}  # fmt: skip
