# jax.tree_util: the structure of a tree without its leaves, and the path to a leaf.

from collections.abc import Iterable
from typing import Any

type KeyPath = tuple[Any, ...]

class PyTreeDef:
    @property
    def num_leaves(self) -> int: ...
    def unflatten(self, leaves: Iterable[Any], /) -> Any: ...

def keystr(keys: KeyPath, *, simple: bool = False, separator: str = "") -> str: ...
