"""The converter does not read rms_norm_eps: eps is 1e-6.

The backbone takes layer_norm_epsilon, whose default is 1e-6; the converter of Hugging Face checkpoints leaves it there,
whatever rms_norm_eps says. It matters for every Llama with another eps that `from_preset` converts, such as
meta-llama/Meta-Llama-3-8B and meta-llama/Llama-3.1-8B, where it is 1e-05; most where the mean square is small, in the
first layers. The converters of Mistral, Mixtral and Qwen do read it.
"""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

from keras_hub.models import Llama3Backbone
from keras_hub.src.utils.transformers import convert_llama3

KIND = "Fault"
WHERE = "keras_hub/src/utils/transformers/convert_llama3.py:15"
SHOWS = ("plain", "tied", "llama3", "linear", "yarn")
CURE = "pass rms_norm_eps as layer_norm_epsilon"
SEEN = ""


def cure() -> None:
    original = convert_llama3.convert_backbone_config

    def convert(transformers_config: dict[str, Any]) -> Any:
        return original(transformers_config) | {"layer_norm_epsilon": transformers_config["rms_norm_eps"]}

    convert_llama3.convert_backbone_config = convert


if __name__ == "__main__":
    config = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"hidden_size": 8, "intermediate_size": 8, "tie_word_embeddings": False, "rope_theta": 1e4}
    backbone = Llama3Backbone(**convert_llama3.convert_backbone_config(config | {"rms_norm_eps": 1e-5}))
    print(f"rms_norm_eps of the checkpoint: {1e-5}")
    print(f"eps of keras-hub's norms:       {backbone.layer_norm.epsilon}")
