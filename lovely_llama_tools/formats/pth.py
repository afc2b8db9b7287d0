"""Files of torch.save: their zip directories are checked, then torch maps the tensors and runs nothing."""

import math
import os
import re
import warnings
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from lovely_llama import LlamaError, check

from ..extras import counted, extra
from .model import Tensor, open_file

OLDEST = (2, 10)  # of torch: before it, weights_only did not keep all code from running
KINDS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
# The entries of an archive, in its one folder. Others would hold the code of TorchScript.
ENTRIES = r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+"
KEPT = 2**26  # bytes


class Part:
    """The tensors in one file. They are mapped, and mapped anew now and then: what has been read stays in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.read = path, 0
        self.torch = torch()
        self.stored = scan_zip(path)
        self.mapped = self.map()
        self.tensors = {name: Tensor(tuple(t.shape), KINDS[str(t.dtype)]) for name, t in self.mapped.items()}

    def map(self) -> dict[str, Any]:
        """All tensors by name. torch reads what describes them, and with weights_only calls nothing that it names."""
        must = partial(check, file=self.path)
        try:
            with warnings.catch_warnings(action="ignore"):  # newer versions warn of what is refused below
                found: Any = self.torch.load(str(self.path), map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"{named[1]}, which is code" if named else f"what torch refuses with {type(error).__name__}"
            raise LlamaError(self.path, "contents", what, "tensors and nothing else") from error
        must("contents", f"a {type(found).__name__}", isinstance(found, dict), "tensors by name")
        size, bytes_of = self.path.stat().st_size, dict[int, int]()
        for name, tensor in cast(dict[Any, Any], found).items():
            is_tensor = isinstance(name, str) and isinstance(tensor, self.torch.Tensor)
            must(f"{name!s:.60}", f"a {type(tensor).__name__}", is_tensor, "a tensor")
            plain = str(tensor.layout) == "torch.strided" and str(tensor.device) == "cpu"
            must(name, f"a tensor of {tensor.layout} on {tensor.device}", plain, "a plain tensor in the file")
            must(name, tensor.dtype, str(tensor.dtype) in KINDS, "weights in float32, float16 or bfloat16")
            storage, need = tensor.untyped_storage(), tensor.element_size() * math.prod(tensor.shape)
            must(name, f"{need} bytes", need <= storage.nbytes() <= size, f"at most {storage.nbytes()}, as stored")
            bytes_of[storage.data_ptr()] = storage.nbytes()
        good = Counter(bytes_of.values()) == self.stored
        must("contents", "records of other lengths than the tensors say", good, "the same")
        return found

    def get(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor, not copied."""
        if self.read > KEPT:
            self.mapped, self.read = self.map(), 0
        tensor = self.mapped[name].detach()
        shape, kind = self.tensors[name]
        check(name, tuple(tensor.shape), tuple(tensor.shape) == shape, f"{shape}, as when it was opened", self.path)
        self.read += tensor.element_size() * math.prod(shape)
        if kind == "BF16":
            return tensor.contiguous().view(self.torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def torch() -> Any:
    """The package, if it is recent enough."""
    found: Any = extra("torch", "torch")
    version = tuple(map(int, re.findall(r"\d+", found.__version__)[:2]))
    how = f"{'.'.join(map(str, OLDEST))} or newer: pip install --upgrade torch"
    check("torch", found.__version__, version >= OLDEST, how, "environment")
    return found


def scan_zip(path: Path) -> "Counter[int]":
    """The lengths of the records in an archive, which must lie in it uncompressed, as torch writes them."""
    must = partial(check, file=path)
    with open_file(path, path.parent) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(4)
        must("contents", f"no zip file, of {counted(size, 'byte')}", head == b"PK\3\4", "one, as torch.save makes")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except Exception as error:  # of many kinds
            raise LlamaError(path, "contents", "a damaged or truncated zip file", "one that torch.save made") from error
    for entry in entries:
        name = entry.filename.partition("/")[2]
        must("contents", f"an entry {entry.filename:.60}", bool(re.fullmatch(ENTRIES, name)), "those of torch.save")
        plain = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        must("contents", f"{entry.filename:.60}, compressed", plain, "entries as torch.save stores them")
    total = sum(entry.file_size for entry in entries)
    must("contents", f"entries of {total} bytes", total <= size, f"at most {size}, the file's")
    twice = len(entries) - len({entry.filename for entry in entries})
    must("contents", f"{twice} entries of the same name", not twice, "different names")
    return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)
