"""A scaling in rope_parameters is not read: there is none.

transformers 5 writes theta and the scaling into rope_parameters, in the place of rope_theta and rope_scaling. The
converter takes theta from there, but looks for the scaling in rope_scaling alone: one of type llama3 is lost without a
word, and so are the types that it refuses under the old name. It matters for every Llama with a scaling that
transformers 5 has saved, such as a fine-tuned meta-llama/Llama-3.1-8B.
"""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

from keras_hub.src.utils.transformers import convert_llama3

KIND = "Fault"
WHERE = "keras_hub/src/utils/transformers/convert_llama3.py:26"
SHOWS = ("llama3", "linear", "yarn")
CURE = "look for the scaling in rope_parameters too"
SEEN = ""


def cure() -> None:
    original = convert_llama3.convert_backbone_config

    def convert(transformers_config: dict[str, Any]) -> Any:
        rope = transformers_config.get("rope_parameters", {"rope_type": "default"})
        scaled = rope["rope_type"] != "default"
        return original(transformers_config | {"rope_scaling": rope} if scaled else transformers_config)

    convert_llama3.convert_backbone_config = convert


if __name__ == "__main__":
    config = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"hidden_size": 8, "intermediate_size": 8, "tie_word_embeddings": False}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = convert_llama3.convert_backbone_config(config | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = convert_llama3.convert_backbone_config(config | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    for label, found in {"rope_theta and rope_scaling": old, "rope_parameters": new}.items():
        factor = found.get("rope_frequency_adjustment_factor")
        print(f"of {label}: theta {found['rope_max_wavelength']}, factor {factor}")
