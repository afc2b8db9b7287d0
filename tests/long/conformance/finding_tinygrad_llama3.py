"""Llama 3.1's scaling of the rotation, a tensor of the GGUF file, is left out.

from_gguf takes the base alone, and a comment notes that rope_freqs.weight is unused; the package's list of models
(tinygrad/llm/cli.py) names Llama 3.1 8B and Llama 3.2 1B and 3B. The checkpoint's owner divides each frequency by that
tensor: by 8 where a pair makes less than one turn in 8192 positions (by 32 in Llama 3.2 1B and 3B), and by less where
it makes one to four. It matters for Llama 3.1, 3.2 and 3.3 at any length, and more in a longer text.
"""

from typing import Any

import run_tinygrad  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tinygrad import Tensor
from tinygrad.llm import model

KIND = "Fault"
WHERE = "tinygrad/llm/model.py:460"
SHOWS = ("llama3",)
CURE = "divide the frequencies by rope_freqs.weight"
SEEN = ""


def cure() -> None:
    load, plain, factors = model.Transformer.from_gguf, model.precompute_freqs_cis, list[Any]()

    def loaded(gguf: Any, *options: Any) -> Any:
        tensors = model.gguf_load(gguf)[1]
        factors[:] = [tensors["rope_freqs.weight"]] if "rope_freqs.weight" in tensors else []
        return load(gguf, *options)

    def cured(dim: int, end: int, theta: float, device: Any = None) -> Any:
        if not factors:
            return plain(dim, end, theta, device=device)
        rates = 1 / (theta ** (Tensor.arange(0, dim, 2) / dim) * factors[0].to(None))
        angles = Tensor.arange(end).unsqueeze(1) * rates
        return angles.cos().cat(angles.sin(), dim=-1).clone(device)

    model.Transformer.from_gguf, model.precompute_freqs_cis = staticmethod(loaded), cured


if __name__ == "__main__":
    turn = model.precompute_freqs_cis(128, 100_001, 5e5)[100_000, 127].asin().item()
    print(f"tinygrad turns the last pair of Llama 3.1 8B at 100,000 by {turn:.4f}, as its table is of the base alone")
    print(f"rope_freqs.weight of that pair is 8: it turns by {100_000 / 5e5 ** (126 / 128) / 8:.4f}")
