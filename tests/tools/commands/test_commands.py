"""The command line as a process: through pipes, on a terminal, and interrupted."""

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from builders import write_talker

from lovely_llama import LlamaError, Sampling, __version__
from lovely_llama_tools import commands
from lovely_llama_tools.__main__ import PROGRAMS
from lovely_llama_tools.commands import chat as talk
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.inference.generate import Generation, generate
from lovely_llama_tools.tokens import Tokenizer

PROGRAM = Path(sys.executable).with_name("lovely-llama")
ENDS = "ended|cut at --max-new|cut where the context ends|interrupted"
SPEEDS = rf"prompt \d+ tokens(?: \((\d+) cached\))?, ([\d.]+)/s; new (\d+), [\d.]+/s; ({ENDS})"
PATIENCE = 60  # seconds: the machine may be busy


class Done(NamedTuple):
    status: int
    out: str
    err: str


def call(*arguments: object, say: str = "") -> Done:
    """Run the program to its end."""
    command = [str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, input=say, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a context of 64."""
    return write_talker(tmp_path_factory.mktemp("talker") / "talker.gguf")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that generates letters, with a long context."""
    return write_talker(tmp_path_factory.mktemp("talker") / "talker.gguf", ctx=8192)


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sky() -> Done:
    return call("chat", "Why is the sky blue?", "--temperature", 0, "--max-new", 60)


def test_the_sky_is_blue_by_rayleigh_scattering(sky: Done) -> None:
    assert sky.status == 0
    assert "Rayleigh" in sky.out
    assert sky.out.endswith("\n")
    assert "<|" not in sky.out


def test_statistics_go_to_stderr(sky: Done) -> None:
    (line,) = sky.err.splitlines()
    match = re.fullmatch(SPEEDS, line)
    assert match, line
    assert int(match[3]) == 60
    assert match[4] == "cut at --max-new"


def test_a_conversation_remembers() -> None:
    """Through a pipe: one question per line, empty lines ignored, and no prompts in the output."""
    done = call(
        "chat", "--temperature", 0, "--max-new", 20, "--system", "Be kind.",
        say="My name is Zebulon.\n\nWhat is my name?",
    )  # fmt: skip
    assert done.status == 0
    assert ">" not in done.out
    lines = done.err.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(SPEEDS, line) for line in lines)
    prompts = [int(line.split()[1]) for line in lines]
    assert prompts[1] > prompts[0] + 20
    assert "Zebulon" in done.out[len(done.out) // 2 :]


# ---- Options, with a tiny model --------------------------------------------------------------------------------------


def say(talker: Path, *options: object) -> Done:
    done = call("generate", "the", "--model", talker, "--temperature", 1, "--max-new", 40, *options)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def seeded(talker: Path) -> Done:
    return say(talker, "--seed", 7)


def test_a_second_start_compiles_nothing(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compiled program is stored, so if the second start stores nothing, it has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored = list[set[str]]()
    for _ in range(2):
        say(talker)
        stored.append({path.name for path in (tmp_path / "lovely-llama").glob("*-cache")})
    first, second = stored
    assert len(first) > 5
    assert second == first


def test_a_seed_determines_the_text(talker: Path, seeded: Done) -> None:
    assert len(seeded.out.strip()) == 40
    assert say(talker, "--seed", 7).out == seeded.out
    texts = {seeded.out, say(talker, "--seed", 8).out, say(talker).out}
    assert len(texts) == 3


def test_output_ends_before_a_stop_text(talker: Path, seeded: Done) -> None:
    stop = seeded.out[12:15]
    done = say(talker, "--seed", 7, "--stop", "nowhere", "--stop", stop)
    assert done.out == seeded.out[: seeded.out.index(stop)] + "\n"
    assert done.err.endswith("; ended\n")


def test_bye_ends_a_conversation(talker: Path) -> None:
    done = call("chat", "--model", talker, "--max-new", 3, say="the\n/bye\nthe\n")
    assert done.status == 0
    assert len(done.out.splitlines()) == len(done.err.splitlines()) == 1


def test_a_prompt_comes_from_a_pipe_too(
    short: Path, said: "Said", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole for -, and after a PROMPT; a device such as /dev/null has nothing to add."""
    file, options = tmp_path / "text", ["--model", str(short), "--max-new", "2"]
    file.write_text("one\ntwo\n")
    for prompt, path, text in (("-", file, "one\ntwo"), ("the", file, "the\none\ntwo"), ("the", "/dev/null", "the")):
        with open(path) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert commands.main(["chat", prompt, *options]) == 0
        assert said.conversations[-1] == [{"role": "user", "content": text}]
    for prompt in (["-"], []):
        done = call("generate", *prompt, *options, say="the\n")
        assert done.status == 0 and done.err.startswith("prompt 2 tokens")
    done = call("generate", *options)
    assert done.status == 2 and "PROMPT: got none, expected a text, piped input" in done.err


def test_statistics_tell_what_was_cached_and_may_be_left_out(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The speed of a prompt is that of its new tokens: here 4 in half a second."""
    generation = generate(load(short), [80] * 9, 4)
    talk.say(generation, quiet=True)
    assert capsys.readouterr().err == ""
    generation.cached, generation.times = 5, [0.0, 0.5, 1.0, 2.0]
    talk.say(generation)
    assert capsys.readouterr().err.startswith("prompt 9 tokens (5 cached), 8.0/s; new 4, 1.0/s; ")
    done = call("chat", "--model", short, "--max-new", 2, say="a\nb\n")
    first, second = (re.fullmatch(SPEEDS, line) for line in done.err.splitlines())
    assert first and second and first[1] is None and int(second[1]) > 10
    assert call("chat", "a", "--model", short, "--max-new", 2, "--quiet").err == ""


def test_a_conversation_outlives_its_context(short: Path) -> None:
    """The oldest turns are dropped, and that is said once."""
    done = call("chat", "--model", short, "--max-new", 4, say="abcd\n" * 9)
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 9
    notes = [line for line in done.err.splitlines() if not re.fullmatch(SPEEDS, line)]
    assert notes == ["note: the oldest turns no longer fit into the context, and are dropped"]


def test_an_empty_system_message_is_passed_on(short: Path, said: "Said", monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a template's own is not put in its place."""
    monkeypatch.setattr(sys, "stdin", None)
    assert commands.main(["chat", "a", "--model", str(short), "--max-new", "2", "--system", ""]) == 0
    assert said.conversations[-1][0] == {"role": "system", "content": ""}


def test_closed_stdin_is_the_end_of_a_conversation(short: Path) -> None:
    command = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", str(PROGRAM), "chat", "--model", str(short)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unquoted_prompt_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["chat", "hi", "there"]) == 2
    assert "unrecognized arguments: there, expected one PROMPT, in quotes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        commands.main(["--version"])
    assert capsys.readouterr().out == f"lovely-llama {__version__}\n"
    with pytest.raises(LlamaError):
        commands.main(["chat", "--debug", "hi", "--model", "nowhere.gguf"])


def test_a_damaged_program_is_compiled_again(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In silence: one cut short when a process ended, or a disk was full."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    call("generate", "the", "--model", short, "--max-new", 3, "--seed", 1)
    for i, path in enumerate(sorted((tmp_path / "lovely-llama").glob("*-cache"))):
        path.write_bytes(path.read_bytes()[: -1 - i] if i % 2 else b"")
    done = call("generate", "the", "--model", short, "--max-new", 3, "--seed", 1)
    assert done.status == 0 and re.fullmatch(SPEEDS + "\n", done.err)
    assert not [path for path in (tmp_path / "lovely-llama").iterdir() if not path.name.endswith("-cache")]


def test_kept_programs_are_bounded(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used go first."""
    folder = tmp_path / "lovely-llama"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for age, name in enumerate(("new", "old", "older")):
        with (folder / f"{name}-cache").open("wb") as file:
            file.truncate(PROGRAMS // 2 - 100)
        then = time.time() - 1000 * age
        os.utime(folder / f"{name}-cache", (then, then))
    call("generate", "the", "--model", short, "--max-new", 0)
    assert {path.name for path in folder.iterdir()} >= {"new-cache", "old-cache"}
    assert not (folder / "older-cache").exists()


def test_one_line_tells_that_programs_cannot_be_kept(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one for each program."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = call("generate", "the", "--model", short, "--max-new", 3)
    warning, statistics = done.err.splitlines()
    assert re.fullmatch(r"warning: .*/file/lovely-llama: compiled programs are not kept: .*", warning)
    assert done.status == 0 and re.fullmatch(SPEEDS, statistics)


START = "import pathlib, pwd, sys; import lovely_llama_tools.__main__ as program; "


@pytest.mark.parametrize("home", [None, "", "nowhere", "file", "full"])
def test_who_has_no_home_is_told_that_nothing_is_cached(tmp_path: Path, home: str | None) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.cache").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {} if home is None else {"HOME": str(tmp_path / home) if home else ""}
    command = [sys.executable, "-c", f"{START}pwd.getpwuid = {{}}.pop; sys.exit(program.run())", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = "no cache is kept: HOME is not set, or is no folder" if home != "full" else ".*not kept: Not a directory"
    assert done.returncode == 0 and re.fullmatch(f"warning: {said}\n", done.stderr)
    assert not (tmp_path / "nowhere").exists()


def test_foreign_entries_of_the_cache_are_passed_over(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to nothing, folders, and what another process deletes meanwhile: programs are kept all the same."""
    folder = tmp_path / "lovely-llama"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (folder / "a-cache").symlink_to("nowhere")
    (folder / "b-cache").symlink_to(folder / "b-cache")
    (folder / "c-cache/within").mkdir(parents=True)
    deleted = "every = pathlib.Path.glob; pathlib.Path.glob = lambda p, *a: [*every(p, *a), p / 'gone-cache']; "
    command = [sys.executable, "-c", f"{START}{deleted}sys.exit(program.run())", "generate", "the"]
    command += ["--model", str(short), "--max-new", "1"]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.fullmatch(SPEEDS + "\n", done.stderr)
    assert len([path for path in folder.glob("*-cache") if path.is_file()]) > 5


class Said(NamedTuple):
    conversations: list[list[dict[str, str]]]
    options: list[dict[str, Any]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Records what the command line asks of the model, copied at each call."""
    said, prompt, generate = Said([], []), talk.chat_prompt, talk.generate

    def noted_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
        said.conversations.append([dict(message) for message in messages])
        return prompt(tokenizer, messages)

    def noted_generate(*arguments: Any, **options: Any) -> Generation:
        said.options.append(options)
        return generate(*arguments, **options)

    monkeypatch.setattr(talk, "chat_prompt", noted_prompt)
    monkeypatch.setattr(talk, "generate", noted_generate)
    return said


def test_text_is_streamed(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time the next part is requested, those before it have been written and flushed."""
    (arrived, written), parts, following = os.pipe(), list[str](), Generation.__next__

    def watched(generation: Generation) -> str:
        if parts:
            assert os.read(arrived, 100) == parts[-1].encode()
        parts.append(following(generation))
        return parts[-1]

    monkeypatch.setattr(Generation, "__next__", watched)
    os.set_blocking(arrived, False)
    with open(arrived), open(written, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert commands.main(["--debug", "generate", "the", "--model", str(talker), "--max-new", "9"]) == 0
    assert len(parts) == 9


def test_the_whole_conversation_is_passed_on(
    talker: Path, said: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typed = tmp_path / "typed"
    typed.write_text("one\ntwo\n \nthree\n")
    with typed.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert commands.main(["chat", "--model", str(talker), "--max-new", "4", "--system", "sysadmin"]) == 0
    answers = capsys.readouterr().out.splitlines()
    last = said.conversations[-1]
    assert [message["role"] for message in last] == ["system", *["user", "assistant"] * 2, "user"]
    assert [message["content"] for message in last] == ["sysadmin", "one", answers[0], "two", answers[1], "three"]
    assert len(said.conversations) == 3
    assert len({id(options["session"]) for options in said.options}) == 1


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_options_reach_the_model(talker: Path, said: Said, command: str) -> None:
    sampling = [
        "--temperature",
        "0.5",
        "--top-k",
        "5",
        "--top-p",
        "0.8",
        "--min-p",
        "0.1",
        "--repetition-penalty",
        "1.2",
    ]
    others = ["--seed", "3", "--max-new", "2", "--stop", "q"]
    wanted = dict(max_new=2, seed=3, stop=["q"], sampling=Sampling(1.2, 0.5, 5, 0.8, 0.1))
    assert commands.main([command, "the", "--model", str(talker), *sampling, *others]) == 0
    (got,) = said.options
    assert {name: got[name] for name in wanted} == wanted


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    done = call("chat", "--help")
    assert (done.status, done.err) == (0, "")
    samplers = ["temperature", "top-k", "top-p", "min-p", "repetition-penalty"]
    options = ["model", "max-new", *samplers, "seed", "stop", "system"]
    helps = [done.out]
    for arguments in (["generate", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            commands.main(arguments)
        assert caught.value.code == 0
        helps.append(capsys.readouterr().out)
    for option in options:
        assert f"--{option} " in helps[0]
        assert (f"--{option} " in helps[1]) == (option != "system"), option  # `generate` has no system message
    assert all(word in helps[2] for word in ("chat", "generate", "--debug"))


def test_an_error_is_one_line_and_an_exit_status(tmp_path: Path) -> None:
    """Two examples, as processes; the others are in faults_*.py."""
    for arguments, says in (
        (("chat", "hello", "--model", tmp_path / "none.gguf"), f"error: {tmp_path}/none.gguf: path: got "),
        (("chat", "hello", "--warmth", "2"), "error: arguments: "),
    ):
        done = call(*arguments)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(says), done.err
        assert len(done.err.splitlines()) == 1


# ---- A terminal ------------------------------------------------------------------------------------------------------

CONTROL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program on a terminal of its own, and all its output there, as a context manager."""

    def __init__(self, *arguments: object, stdout: int | None = None) -> None:
        self.screen, child = os.openpty()
        command = [sys.executable, "-c", CONTROL, str(PROGRAM), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=stdout or child, stderr=child, start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(child)
        self.shown, self.waited = "", 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def read(self, seconds: float) -> bool:
        """Read the next piece of output; False at its end."""
        if not select.select([self.screen], [], [], seconds)[0]:
            raise TimeoutError(f"nothing more after {self.shown!r}")
        try:
            piece = os.read(self.screen, 4096)
        except OSError:
            piece = b""
        self.shown += piece.decode()
        return bool(piece)

    def wait_for(self, text: str) -> None:
        """Wait for a text in the output after the text last waited for."""
        while text not in self.shown[self.waited :]:
            assert self.read(PATIENCE), f"no {text!r} in {self.shown!r}"
        self.waited = self.shown.index(text, self.waited) + len(text)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def end(self) -> int:
        """The exit status; the terminal must be back in its original mode."""
        while self.read(PATIENCE):
            pass
        status = self.process.wait(PATIENCE)
        echoes = termios.tcgetattr(self.screen)[3]
        assert echoes & termios.ECHO, "the terminal was left with its echo off"
        assert echoes & termios.ICANON
        return status


def test_line_editing_and_end_of_file_on_a_terminal(talker: Path) -> None:
    with Terminal("chat", "--model", talker, "--max-new", "3") as terminal:
        terminal.wait_for("> ")
        terminal.type("thx\x7fe\r")
        terminal.wait_for("prompt ")
        terminal.wait_for("> ")
        terminal.type("\x1b[A")  # up: the previous line, as edited
        terminal.wait_for("the")
        terminal.type("\r")
        terminal.wait_for("prompt ")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert terminal.shown.endswith("\n")
    assert "Traceback" not in terminal.shown


def test_interrupt_at_the_prompt(talker: Path) -> None:
    with Terminal("chat", "--model", talker) as terminal:
        terminal.wait_for("> ")
        terminal.type("half a ques")
        terminal.wait_for("ques")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert terminal.shown.endswith("\n")
    assert "Traceback" not in terminal.shown


def test_interrupt_while_generating(talker: Path) -> None:
    with Terminal("chat", "the", "--model", talker) as terminal:
        while not re.search("[a-h]{20}", terminal.shown):
            assert terminal.read(PATIENCE)
        terminal.type("\x03")
        assert terminal.end() == 130
    assert terminal.shown.endswith("\n")
    assert "Traceback" not in terminal.shown


def test_interrupt_ends_an_answer_and_keeps_the_conversation(talker: Path) -> None:
    with Terminal("chat", "--model", talker) as terminal:
        terminal.wait_for("> ")
        for _ in range(2):
            terminal.type("the\r")
            terminal.wait_for("the\r\n")
            while not re.search("[a-h]{20}", terminal.shown[terminal.waited :]):
                assert terminal.read(PATIENCE)
            terminal.type("\x03")
            terminal.wait_for("; interrupted")
            terminal.wait_for("> ")
        assert " cached)" in terminal.shown  # the second question came after the first answer
        terminal.type("\x03")
        assert terminal.end() == 130
    assert "Traceback" not in terminal.shown


def test_interrupt_while_the_program_starts(talker: Path) -> None:
    """While it imports numpy and jax, which takes half a second."""
    process = subprocess.Popen([str(PROGRAM), "chat", "the", "--model", str(talker)], stderr=subprocess.PIPE)
    maps, limit = Path(f"/proc/{process.pid}/maps"), time.monotonic() + PATIENCE
    while "numpy" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < limit
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, b"\n")


def test_a_line_that_is_too_long_does_not_end_a_conversation(short: Path) -> None:
    with Terminal("chat", "--model", short, "--max-new", "3") as terminal:
        terminal.wait_for("> ")
        terminal.type("a" * 100 + "\r")
        terminal.wait_for("error: prompt: tokens: got ")
        terminal.wait_for("> ")
        terminal.type("/help\r")
        terminal.wait_for("/bye or Ctrl-D ends the conversation")
        terminal.type("the\r")
        terminal.wait_for("prompt ")
        terminal.wait_for("> ")
        terminal.type("/bye\r")
        assert terminal.end() == 0


def test_the_prompt_goes_to_the_terminal_not_to_stdout(talker: Path) -> None:
    output, write = os.pipe()
    with open(output) as file, Terminal("chat", "--model", talker, "--max-new", "3", stdout=write) as terminal:
        os.close(write)
        terminal.wait_for("> ")
        terminal.type("the\r")
        terminal.wait_for("prompt ")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert re.fullmatch("[a-h]{3}\n", file.read())
