"""The base of the rotary frequencies is 10000, whatever config.json says.

Its reading of config.json has no entry for rope_theta and passes 10000 on. It claims Llama 1 and 2, which have that
base, but accepts every config.json with model_type llama: codellama/CodeLlama-7b-hf (1000000) and
meta-llama/Meta-Llama-3-8B (500000) turn too fast.
"""

from collections.abc import Mapping
from typing import Any

from curated_transformers.models.llama import LlamaCausalLM, causal_lm

KIND = "Limit"
WHERE = "curated_transformers/models/llama/_hf.py:113"
SHOWS = ("plain", "llama3", "linear", "yarn")
CURE = "read the base"
SEEN = ""


def cure() -> None:
    """Put the base that config.json states into the config that is read from it."""
    read = causal_lm._config_from_hf

    def reads(hf_config: Mapping[str, Any]) -> Any:
        config = read(hf_config)
        rope = hf_config.get("rope_parameters") or hf_config
        config.layer.attention.rotary_embeddings.rotary_base = rope["rope_theta"]
        return config

    causal_lm._config_from_hf = reads


if __name__ == "__main__":
    sizes = {"hidden_size": 96, "intermediate_size": 220, "vocab_size": 288, "num_hidden_layers": 1}
    stated = {"num_attention_heads": 6, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1000000.0, **sizes}
    model = LlamaCausalLM.from_hf_config(hf_config=stated)
    theta = model.decoder.layers[0].mha.rotary_embeds.rotary_embeds.theta
    print("radians a position of the second pair of 8, by a config.json with rope_theta 1000000:")
    print(f"curated-transformers: {theta[1]:.5f} = 10000^(-1/8)")
    print(f"the checkpoint:       {1000000 ** (-1 / 8):.5f} = 1000000^(-1/8)")
