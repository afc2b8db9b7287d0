"""Optional packages: imported where they are needed, and named in one line where they are missing."""

import importlib
from typing import Any

from lovely_llama import LlamaError


def extra(module: str, name: str) -> Any:
    """Import a module that the extra `name` installs, or say so."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        how = f"it: pip install 'lovely-llama[{name}]'"
        raise LlamaError("environment", package, "no such package", how) from error
