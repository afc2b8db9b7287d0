"""A linear or yarn scaling of a GGUF file is left out.

from_gguf reads rope.freq_base and no rope.scaling key, and says nothing. The checkpoint's owner divides frequencies as
these keys say, and with yarn multiplies cosines and sines by 0.1 ln(factor) + 1 too. It matters for checkpoints such as
DeepSeek Coder 6.7B, a Llama with a linear scaling of 4.
"""

import math
from typing import Any

import numpy as np
import run_tinygrad  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tinygrad import Tensor
from tinygrad.llm import model

KIND = "Limit"
WHERE = "tinygrad/llm/model.py:440"
SHOWS = ("linear", "yarn")
CURE = "read rope.scaling.type, factor and original_context_length, and compute the table by them"
SEEN = ""


def cure() -> None:
    load, plain, stated = model.Transformer.from_gguf, model.precompute_freqs_cis, dict[str, Any]()

    def loaded(gguf: Any, *options: Any) -> Any:
        stated.clear()
        stated.update(model.gguf_load(gguf)[0])
        return load(gguf, *options)

    def cured(dim: int, end: int, theta: float, device: Any = None) -> Any:
        kind, factor = stated.get("llama.rope.scaling.type"), stated.get("llama.rope.scaling.factor", 1.0)
        if kind not in {"linear", "yarn"}:
            return plain(dim, end, theta, device=device)
        pairs, size = np.arange(dim // 2), 1.0
        rates = theta ** (-2 * pairs / dim)
        if kind == "linear":
            rates /= factor
        else:
            context, size = stated["llama.rope.scaling.original_context_length"], 0.1 * math.log(factor) + 1
            fast, slow = (dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
            first, last = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
            slowed = np.clip((pairs - first) / max(last - first, 1e-3), 0, 1)
            rates *= 1 - slowed + slowed / factor
        angles = np.arange(end)[:, None] * rates
        table = size * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return Tensor(table.astype(np.float32), device=device)

    model.Transformer.from_gguf, model.precompute_freqs_cis = staticmethod(loaded), cured


if __name__ == "__main__":
    turn = model.precompute_freqs_cis(128, 1001, 1e4)[1000, 127].asin().item()
    print(f"tinygrad turns the last pair of 64 at 1000 by {turn:.4f}, as its table is of the base alone")
    print(f"with a linear or yarn scaling of 8 it turns by {1000 / 1e4 ** (126 / 128) / 8:.4f}")
