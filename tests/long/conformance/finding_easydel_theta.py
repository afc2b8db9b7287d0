"""The base of rope_parameters is not read: it is 10,000.

LlamaConfig takes rope_theta from its own argument, whose default is 10,000, and the table of the rotation takes it from
there, also where config.json states it in rope_parameters alone, as transformers 5 writes (a scaling that stands there
is read). The checkpoint's owner rotates with the base that rope_parameters states. It matters for checkpoints that
transformers 5 has saved, such as a tuned Llama 3 of base 500,000.
"""

from typing import Any

from easydel import LlamaConfig

KIND = "Fault"
WHERE = "easydel/modules/llama/llama_configuration.py:142"
SHOWS = ("plain", "head_dim", "tied", "llama3", "linear", "yarn")
CURE = "let rope_theta default to that of rope_parameters"
SEEN = ""


def cure() -> None:
    init = LlamaConfig.__init__

    def cured(self: Any, *, rope_parameters: Any = None, **fields: Any) -> None:
        if rope_parameters:
            fields = {"rope_theta": rope_parameters["rope_theta"], "rope_parameters": rope_parameters, **fields}
        init(self, **fields)

    LlamaConfig.__init__ = cured


if __name__ == "__main__":
    stated = {"rope_type": "default", "rope_theta": 500_000.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_parameters=stated)
    print(f"easydel's base: {config.rope_theta:,.0f}")
    print(f"the config's: {stated['rope_theta']:,.0f}")
