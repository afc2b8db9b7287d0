"""The epsilon of all norms is 1e-5.

Its config has no field for it. That is right for Llama 3, which it claims, and whose checkpoints all have 1e-5; with
the weights of others that its loader takes, such as huggyllama/llama-7b (1e-6), the norms of small rows differ.
"""

from typing import Any

import torch
from llms_from_scratch import llama3
from llms_from_scratch.kv_cache import llama3 as cached

KIND = "Limit"
WHERE = "llms_from_scratch/llama3.py:64"
SHOWS = ("plain", "tied", "llama3")
CURE = "set the epsilon that the checkpoint has"
SEEN = ""


def cure() -> None:
    """Set the epsilon of all norms of a model when it is made."""
    for module in (llama3, cached):
        build = module.Llama3Model.__init__

        def builds(self: Any, config: dict[str, Any], build: Any = build) -> None:
            build(self, config)
            for part in self.modules():
                if isinstance(part, torch.nn.RMSNorm):
                    part.eps = config["norm_eps"]

        module.Llama3Model.__init__ = builds


if __name__ == "__main__":
    sizes = {"vocab_size": 8, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "hidden_dim": 8}
    rope = {"n_kv_groups": 1, "rope_base": 10000.0, "rope_freq": None, "dtype": torch.float32}
    model = llama3.Llama3Model({**sizes, **rope, "norm_eps": 1e-6})
    rows = torch.full((1, 8), 0.003)
    print("a row of 0.003, normed, for a checkpoint whose epsilon is 1e-6:")
    print(f"llms-from-scratch: {model.final_norm(rows)[0, 0].item():.4f}")
    print(f"the checkpoint:    {0.003 / (0.003**2 + 1e-6) ** 0.5:.4f}")
