"""The faults of all faults_*.py: variants, twins, and variants without their guards."""

import contextlib
import functools
import importlib
import re
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import faults_commands
import faults_data
import faults_devices
import faults_generation
import faults_gguf
import faults_hugging_face
import faults_llama2c
import faults_meta
import faults_runs
import faults_tokens
import jax
import pytest
from builders import write_talker
from faults import PATIENCE, Accepted, Act, Case, Guard, TooLong, Unlike, World
from removal import remove

from lovely_llama_tools.commands import chat as talk
from lovely_llama_tools.fast import choose
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.model import Model

CASES: dict[str, Case] = {
    **faults_llama2c.CASES,
    **faults_meta.CASES,
    **faults_hugging_face.CASES,
    **faults_gguf.CASES,
    **faults_generation.CASES,
    **faults_commands.CASES,
    **faults_tokens.CASES,
    **faults_runs.CASES,
    **faults_data.CASES,
    **faults_devices.CASES,
}
pytestmark = pytest.mark.usefixtures("no_type_checks", "fewer_optimisations")
VARIANTS = [(case, name) for case in CASES for name in CASES[case].variants]


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Model]:
    folder = tmp_path_factory.mktemp("talkers")
    talker = write_talker(folder / "talker.gguf")
    endless, french = write_talker(folder / "endless.gguf", ctx=8192), write_talker(folder / "french.gguf", "é")
    return talker, endless, french, load(talker)


@pytest.fixture
def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talkers: tuple[Path, Path, Path, Model],
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None],
) -> Generator[World]:  # fmt: skip
    if name := request.node.callspec.params.get("case"):
        case = CASES[name]
        record_property("fault", (name, case.severity, len(case.variants)))  # for the summary in conftest.py
    world = World(tmp_path, monkeypatch, *talkers)
    yield world
    world.end()


@contextlib.contextmanager
def at_most(seconds: float) -> Generator[None]:
    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_programs() -> None:
    """Clear compiled programs, so that none outlives the removal or the return of a guard."""
    programs = importlib.import_module("lovely_llama_tools.inference.generate")
    for compiled in (choose, programs.read_tokens, programs.read_layer, programs.read_out):
        compiled.clear_cache()


@contextlib.contextmanager
def without(world: World, guard: Guard) -> Generator[None]:
    forget = forget_programs if guard.compiled else lambda: None
    try:
        with world.patch.context() as patch:
            world.patch, world.removed = patch, guard.removed
            forget()
            remove(guard.removed, functools.partial(patch.setattr, raising=False))
            yield
    finally:
        forget()


@pytest.mark.parametrize(("case", "name"), VARIANTS)
def test_variant(world: World, case: str, name: str) -> None:
    """It ends as the contract requires."""
    with at_most(PATIENCE):
        CASES[case].variants[name].act(world)


WORKING = set[Act]()  # twins that have passed: several cases may have the same


@pytest.mark.parametrize("case", CASES)
def test_twin(world: World, case: str) -> None:
    """The valid counterpart of the case works."""
    twin = CASES[case].twin
    if twin not in WORKING:
        twin(world)
        WORKING.add(twin)


@pytest.mark.parametrize(("case", "name"), VARIANTS)
def test_variant_without_its_guard(world: World, case: str, name: str) -> None:
    """It fails in exactly the way stated for it."""
    act, guard = CASES[case].variants[name]
    seconds = 5 if guard.end is TooLong else PATIENCE
    with pytest.raises(BaseException) as caught, without(world, guard), at_most(seconds):
        act(world)
    plainly_wrong = (AssertionError, Accepted, Unlike)  # told apart, though all are AssertionErrors
    stated = caught.type is guard.end if guard.end in plainly_wrong else issubclass(caught.type, guard.end)
    assert stated, f"without {', '.join(guard.removed)} it ended in {caught.value!r}, not {guard.end}"


@pytest.mark.parametrize(
    "fault", [RuntimeError("a\nb"), MemoryError(), TypeError("no"), jax.errors.JaxRuntimeError("x")]
)
def test_an_unexpected_exception_is_one_line(world: World, fault: Exception) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise fault

    world.patch.setattr(talk, "load", fail)
    done = world.run("generate")
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    with pytest.raises(type(fault)):
        world.main("--debug", "generate", "abc")
