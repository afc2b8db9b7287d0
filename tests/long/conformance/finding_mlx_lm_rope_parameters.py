"""rope_parameters is not read: theta is then 10,000, and there is no scaling.

transformers 5 writes theta and the scaling into rope_parameters, in the place of rope_theta and rope_scaling.
mlx-lm's Llama knows the two old fields only and drops what it does not know, so that theta is its default of 10,000 and
a scaling is lost, without a word. Other models of mlx-lm (qwen3, ministral3, mistral4) do read rope_parameters. It
matters for every Llama that transformers 5 has saved, unless its theta is 10,000 and it has no scaling: such as a
fine-tuned meta-llama/Llama-3.1-8B, whose theta is 500,000, with a scaling of type llama3.
"""

from typing import Any

from mlx_lm.models.llama import ModelArgs

KIND = "Fault"
WHERE = "mlx_lm/models/llama.py:30"
SHOWS = ("plain", "head_dim", "tied", "llama3", "linear", "yarn")
CURE = "read theta and the scaling from rope_parameters, where it is stated"
SEEN = "ml-explore/mlx-lm#953, closed, which says that the config of every model needs it"


def cure() -> None:
    original = ModelArgs.from_dict

    def from_dict(config: dict[str, Any]) -> Any:
        rope = config.get("rope_parameters")
        return original(config | {"rope_theta": rope["rope_theta"], "rope_scaling": rope} if rope else config)

    ModelArgs.from_dict = from_dict


if __name__ == "__main__":
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    sizes = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 128256}
    old = ModelArgs.from_dict(sizes | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelArgs.from_dict(sizes | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    print(f"of rope_theta and rope_scaling: theta {old.rope_theta}, scaling {old.rope_scaling}")
    print(f"of rope_parameters:             theta {new.rope_theta}, scaling {new.rope_scaling}")
