"""What people do with a Llama: load it, talk to it, train it, check it.

This is the catalogue of public names; the command line is `lovely_llama_tools.commands.main`. A module is imported when
one of its names is first used, so that importing this package costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparing.diff import diff as diff
    from .comparing.properties import check_cache as check_cache
    from .comparing.properties import check_causality as check_causality
    from .comparing.properties import check_heads as check_heads
    from .comparing.properties import check_logits as check_logits
    from .comparing.properties import check_rotation as check_rotation
    from .comparing.properties import check_rows as check_rows
    from .comparing.trace import trace as trace
    from .formats.files import default_model as default_model
    from .formats.files import load as load
    from .formats.files import save as save
    from .formats.hugging_face import from_hf as from_hf
    from .formats.hugging_face import to_hf as to_hf
    from .formats.hugging_face_config import config_from_hf as config_from_hf
    from .formats.hugging_face_config import config_to_hf as config_to_hf
    from .formats.llama2c import from_llama2c as from_llama2c
    from .formats.llama2c import to_llama2c as to_llama2c
    from .formats.model import Model as Model
    from .inference.batch import generate_all as generate_all
    from .inference.chat import chat_prompt as chat_prompt
    from .inference.generate import Session as Session
    from .inference.generate import generate as generate
    from .inference.harness import harness as harness
    from .inference.scoring import perplexity as perplexity
    from .tokens import Tokenizer as Tokenizer
    from .tokens import folder_tokenizer as folder_tokenizer

WHERE = {
    "inference.batch": ["generate_all"],
    "inference.chat": ["chat_prompt"],
    "comparing.properties": [
        "check_cache", "check_causality", "check_heads", "check_logits", "check_rotation", "check_rows",
    ],
    "comparing.diff": ["diff"],
    "comparing.trace": ["trace"],
    "formats.files": ["default_model", "load", "save"],
    "formats.model": ["Model"],
    "formats.hugging_face": ["from_hf", "to_hf"],
    "formats.hugging_face_config": ["config_from_hf", "config_to_hf"],
    "formats.llama2c": ["from_llama2c", "to_llama2c"],
    "inference.generate": ["Session", "generate"],
    "inference.harness": ["harness"],
    "inference.scoring": ["perplexity"],
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

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *MODULES]


sys.modules[__name__].__class__ = Lazy
