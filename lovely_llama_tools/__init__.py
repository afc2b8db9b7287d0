"""What people do with a Llama: load it, talk to it, run it from a command line.

A module is loaded when one of its names is first asked for, so that importing this package costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch_generate import generate_all as generate_all
    from .chat import chat_prompt as chat_prompt
    from .comparing.properties import check_cache as check_cache
    from .comparing.properties import check_causality as check_causality
    from .comparing.properties import check_heads as check_heads
    from .comparing.properties import check_logits as check_logits
    from .comparing.properties import check_rotation as check_rotation
    from .comparing.properties import check_rows as check_rows
    from .files import default_model as default_model
    from .files import load as load
    from .files import save as save
    from .formats import Model as Model
    from .formats.hugging_face import from_hf as from_hf
    from .formats.hugging_face import to_hf as to_hf
    from .formats.hugging_face_config import config_from_hf as config_from_hf
    from .formats.hugging_face_config import config_to_hf as config_to_hf
    from .formats.llama2c import from_llama2c as from_llama2c
    from .formats.llama2c import to_llama2c as to_llama2c
    from .generate import Session as Session
    from .generate import generate as generate
    from .harness import harness as harness
    from .scoring import perplexity as perplexity
    from .tokens import Tokenizer as Tokenizer
    from .tokens import folder_tokenizer as folder_tokenizer

WHERE = {
    "batch_generate": ["generate_all"],
    "chat": ["chat_prompt"],
    "comparing.properties": [
        "check_cache", "check_causality", "check_heads", "check_logits", "check_rotation", "check_rows",
    ],
    "files": ["default_model", "load", "save"],
    "formats": ["Model"],
    "formats.hugging_face": ["from_hf", "to_hf"],
    "formats.hugging_face_config": ["config_from_hf", "config_to_hf"],
    "formats.llama2c": ["from_llama2c", "to_llama2c"],
    "generate": ["Session", "generate"],
    "harness": ["harness"],
    "scoring": ["perplexity"],
    "tokens": ["Tokenizer", "folder_tokenizer"],
}  # fmt: skip
MODULES = {name: module for module, names in WHERE.items() for name in names}


class Lazy(ModuleType):
    """A package that loads its public names on demand."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [*MODULES]
        if name not in MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{MODULES[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        # Loading a module sets it as an attribute here; `generate` is to remain the function.
        if not (name in MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *MODULES]


sys.modules[__name__].__class__ = Lazy
