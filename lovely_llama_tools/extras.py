"""Optional packages: imported where they are needed, and named in one line where they are missing."""

import importlib
from typing import Any

from lovely_llama import LlamaError

# The packages of each extra, by the names under which an index has them. This project itself is on none.
PACKAGES = {"chat": ("gguf", "tokenizers", "jinja2")}


def extra(module: str, name: str) -> Any:
    """Import a module of the extra `name`, or say how to install its packages."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        how = f"it: pip install {' '.join(PACKAGES[name])}"
        raise LlamaError("environment", module.split(".")[0], "no such package", how) from error
