"""The package: importing it loads nothing, and an optional package that is missing is named in one line."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lovely_llama_tools
from lovely_llama import LlamaError
from lovely_llama_tools.extras import extra

FILE = Path(lovely_llama_tools.__file__ or "")


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_package_loads_nothing() -> None:
    """Not even the library; and importing all its names loads no optional package."""
    loaded = "print(*[n for n in sys.modules if n.partition('.')[0] in ('jax', 'numpy', 'lovely_llama_tools')])"
    assert printed(f"import sys, lovely_llama_tools; {loaded}") == ["lovely_llama_tools"]
    others = "('gguf', 'tokenizers', 'jinja2', 'sentencepiece', 'lovely_llama_tools.commands')"
    assert not printed(
        f"import sys; from lovely_llama_tools import *; print(*[n for n in sys.modules if n in {others}])"
    )


def test_no_module_is_hidden_by_a_function_of_its_name() -> None:
    """`import lovely_llama_tools.X as m` gives a module, whatever was used before."""
    names = [".".join(path.relative_to(FILE.parents[1]).with_suffix("").parts) for path in FILE.parent.rglob("*.py")]
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    assert len(modules) > 50
    lines = [
        "from lovely_llama_tools import *",
        *(f"import {name} as m; print(isinstance(m, type(ast)))" for name in modules),
    ]
    assert {*printed("\n".join(["import ast", *lines]))} == {"True"}


def test_names_match_those_for_type_checkers() -> None:
    (checked,) = [node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == lovely_llama_tools.MODULES
    for name in lovely_llama_tools.MODULES:
        assert getattr(lovely_llama_tools, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        lovely_llama_tools.generat  # noqa: B018  # pyright: ignore


def test_star_imports_replace_no_names_of_others() -> None:
    """Such as torch's tensor; and there is a version."""
    for module in ("lovely_llama", "lovely_llama_tools"):
        assert printed(f"tensor = tree = np = 1; from {module} import *; print(tensor, tree, np)") == ["1", "1", "1"]
    assert printed("import lovely_llama as ll; print(ll.__version__)") == [metadata.version("lovely-llama")]


def test_a_missing_package_is_reported_with_its_extra() -> None:
    assert extra("json", "chat").loads("1") == 1
    with pytest.raises(
        LlamaError, match=r"^environment: nowhere: got no such package, .*pip install gguf tokenizers jinja2 tqdm$"
    ) as caught:
        extra("nowhere.module", "chat")
    assert (caught.value.file, caught.value.field) == ("environment", "nowhere")


OTHER_JAX = "import sys, jax, jaxlib; jaxlib.__version__ = sys.argv.pop(1); "
RUNS = "import lovely_llama_tools.__main__ as program; sys.exit(program.run())"
EXPECTED = "0.10 or later: pip install jax==0.10.2 jaxlib==0.10.2"


def with_jax(version: str, code: str) -> "subprocess.CompletedProcess[str]":
    """A program that takes jaxlib for another version."""
    command = [sys.executable, "-c", OTHER_JAX + code, version, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_jax_that_is_too_old_is_refused_in_one_line() -> None:
    """By every wing, and by the command line; never by the library."""
    line = f"environment: jaxlib: got 0.9.2, expected {EXPECTED}\n"
    done = with_jax("0.9.2", RUNS)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}")
    wings = ("commands", "planning.plans", "training.loop", "data.prepare", "pictures.losses", "comparing.properties")
    for module in (*wings, "inference.generate", "formats.files", "tokens", "fast", "devices.partition"):
        done = with_jax("0.9.2", f"import lovely_llama; print(1); import lovely_llama_tools.{module}")
        assert done.stdout == "1\n" and done.stderr.endswith(f"LlamaError: {line}"), module
