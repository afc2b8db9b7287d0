"""Processes that work together: what they compare before they start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "from lovely_llama_tools.devices.cluster import code; print(code())"


def test_processes_with_other_code_differ(tmp_path: Path) -> None:
    """In the library, or in any module of the tools."""
    shutil.copy(ROOT / "lovely_llama.py", tmp_path)
    shutil.copytree(ROOT / "lovely_llama_tools", tmp_path / "lovely_llama_tools")

    def code() -> str:
        env = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    found = [code(), code()]
    for name in ("lovely_llama.py", "lovely_llama_tools/extras.py", "lovely_llama_tools/training/loop.py"):
        with open(tmp_path / name, "a") as file:
            file.write("# changed\n")
        found.append(code())
    assert found[0] == found[1] and len({*found}) == 4
