"""tinygrad: Transformer.from_gguf with HALF=0; the wheel lacks a module of it, and zig is its clang."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serving import serve

compiler = Path(sys.prefix) / "cc"
compiler.write_text(f"""#!/bin/sh
for option; do
    shift
    case $option in --target=*|-o|-) ;; *) set -- "$@" "$option" ;; esac
done
source=$(mktemp --suffix .c) object=$(mktemp)
cat > "$source"
{sys.executable} -m ziglang cc -target x86_64-freestanding-none -g0 -fno-sanitize=undefined "$@" "$source" -o "$object"
cat "$object"
rm "$source" "$object"
""")
compiler.chmod(0o755)
os.environ |= {"CC": str(compiler), "XDG_CACHE_HOME": str(Path(sys.prefix) / "cache"), "DEV": "CPU", "HALF": "0"}

from tinygrad import Tensor, UOp, nn  # noqa: E402

sys.modules["tinygrad.llm.kernels"] = sys.modules["tinygrad.llm.kernels.amd"] = SimpleNamespace(  # pyright: ignore
    Linear=nn.Linear, gated_delta_prefill=None, flash_attention=None, amd_custom_kernels_supported=lambda device: False
)

from tinygrad.llm.model import Transformer  # noqa: E402

INSTALL = ("pip install tinygrad==0.14.0", "pip install ziglang==0.17.1")


def load(folder: Path, dtype: str) -> Any:
    return Transformer.from_gguf(folder.with_suffix(".gguf"))[0]


def logits(model: Any, ids: list[int], start: Any = 0) -> Any:
    x = model.token_embd(Tensor([ids])).float()
    for block in model.blk:
        x = block(x, start)
    return model.output(model.output_norm(x)).numpy()[0]


def decode(model: Any, ids: list[int]) -> Any:
    place = UOp.variable("start_pos", 0, model.max_context - 1)
    return [logits(model, [token], place.bind(index))[0] for index, token in enumerate(ids)]


if __name__ == "__main__":
    serve("tinygrad", load, logits, decode, dtypes=("float32",))
