"""rope_scaling is not read.

The frequencies are unscaled whatever config.json states, and nothing is said. It claims Llama 1 and 2, of which some
are published with a scaling: togethercomputer/LLaMA-2-7B-32K (linear, factor 8), NousResearch/Yarn-Llama-2-7b-128k
(yarn, factor 32). meta-llama/Llama-3.1-8B (llama3, factor 8) is accepted too.
"""

import math
from typing import Any

import torch
from curated_transformers.layers.embeddings import RotaryEmbeddings
from curated_transformers.models.llama import LlamaCausalLM

KIND = "Limit"
WHERE = "curated_transformers/models/llama/_hf.py:81"
SHOWS = ("llama3", "linear", "yarn")
CURE = "scale the frequencies"
SEEN = ""


def cure() -> None:
    """Scale the frequencies of a model when it is made."""
    build = LlamaCausalLM.from_hf_config.__func__

    def builds(cls: Any, *, hf_config: Any, device: Any = None) -> Any:
        model = build(cls, hf_config=hf_config, device=device)
        rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        for module in model.modules():
            if isinstance(module, RotaryEmbeddings) and "factor" in rope:
                factor = rope["factor"]
                share = unscaled(module.theta, rope)
                module.theta = module.theta * (share + (1 - share) / factor)
                module._create_rotary_embed(width=2 * len(module.theta), length=512)
                gain = 0.1 * math.log(factor) + 1 if rope["rope_type"] == "yarn" else 1.0
                module.cos, module.sin = module.cos * gain, module.sin * gain
        return model

    LlamaCausalLM.from_hf_config = classmethod(builds)


def unscaled(theta: Any, rope: dict[str, Any]) -> Any:
    """Which share of each frequency stays."""
    if rope["rope_type"] == "linear":
        return torch.zeros_like(theta)
    turns = rope["original_max_position_embeddings"] * theta / (2 * math.pi)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return ((turns - low) / (high - low)).clamp(0, 1)
    step = torch.log(theta[0] / theta[1])  # from pair to pair
    begin, end = (torch.log(turns[0] / rope[beta]) / step for beta in ("beta_fast", "beta_slow"))
    begin, end = max(math.floor(begin), 0), min(math.ceil(end), 2 * len(theta) - 1)
    return 1 - ((torch.arange(len(theta)) - begin) / (end - begin)).clamp(0, 1)


if __name__ == "__main__":
    sizes = {"hidden_size": 96, "intermediate_size": 220, "vocab_size": 288, "num_hidden_layers": 1}
    stated = {"num_attention_heads": 6, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, **sizes}
    model = LlamaCausalLM.from_hf_config(hf_config=stated | {"rope_scaling": {"type": "linear", "factor": 8.0}})
    theta = model.decoder.layers[0].mha.rotary_embeds.rotary_embeds.theta
    print("radians a position of the first pair, by a config.json with linear scaling of factor 8:")
    print(f"curated-transformers: {theta[0]:.5f}")
    print(f"the checkpoint:       {1 / 8:.5f}")
