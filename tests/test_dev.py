"""The developer's script: its exit status, and the environment for the README."""

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def load_dev() -> ModuleType:
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("dev", str(Path(__file__).parents[1] / "dev"))
    spec = importlib.util.spec_from_loader("dev", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with an environment whose programs succeed."""
    module = load_dev()
    for name in ("ruff", "pyright", "lint-imports", "python"):
        program(tmp_path / name, "exit 0")
    monkeypatch.setattr(module, "BIN", tmp_path)
    for name in ("install_dev", "install_readme", "install_tpu"):
        monkeypatch.setattr(module, name, lambda: None)
    return module


def program(path: Path, code: str) -> None:
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("python", "exit 0", 0),
        ("python", "exit 3", 3),
        ("python", "kill -SEGV $$", 139),
        ("pyright", "kill -9 $$", 137),
        ("lint-imports", "exit 1", 1),
    ],
)
def test_a_failing_program_fails_the_script(dev: ModuleType, tmp_path: Path, name: str, code: str, status: int) -> None:
    """A program that was ended by a signal has a negative status, which is not a success."""
    program(tmp_path / name, code)
    assert dev.main([]) == status


def test_the_readmes_environment_is_made_by_its_pip_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and anew when these lines or the requirements change, so that nothing of the old one remains.

    Where only modules change, their copies are replaced."""
    monkeypatch.delenv("CONSTRAINTS", raising=False)
    dev, ran = load_dev(), list[list[str]]()
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "README", tmp_path / ".venv" / "readme")
    create = dev.venv.create

    def run(command: list[str], **_: Any) -> None:
        assert command[0] == str(dev.README / "bin" / "python")
        ran.append(command[6:])  # after pip's options

    def bare(folder: Path, **options: Any) -> None:
        create(folder, **{**options, "with_pip": False})

    monkeypatch.setattr(dev, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(dev, "venv", SimpleNamespace(create=bare))
    readme, package = tmp_path / "README.md", tmp_path / "lovely_llama_tools"
    package.mkdir()
    (tmp_path / "build").mkdir()
    for name in ("requirements.txt", "pyproject.toml", "lovely_llama.py"):
        (tmp_path / name).touch()
    readme.write_text("Say `pip install x`, or\n```sh\npip install '.[chat]'\npip install --no-deps a==1\n```\n")
    steps = [[".[chat]", "-c", "requirements.txt"], ["--no-deps", "a==1", "-c", "requirements.txt"]]

    def again() -> list[list[str]]:
        ran.clear()
        dev.install_readme()
        return ran

    assert again() == steps
    assert not (tmp_path / "build").exists()
    assert again() == []
    (dev.README / "left").touch()
    readme.write_text(readme.read_text().replace("a==1", "a==2"))
    assert again() == [steps[0], ["--no-deps", "a==2", "-c", "requirements.txt"]]
    assert not (dev.README / "left").exists()
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text("1")
        assert len(again()) == 2 and not again()
    for name in ("lovely_llama.py", "lovely_llama_tools/new.py"):
        (tmp_path / name).write_text("1")
        assert again() == [["--no-deps", "--force-reinstall", "."]] and not again()
    readme.write_text(readme.read_text().replace("a==2", "a==1"))
    assert again() == steps
