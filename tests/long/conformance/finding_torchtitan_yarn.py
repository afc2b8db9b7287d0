"""YaRN's attention factor is left out.

With `scaling="yarn"` the frequencies are YaRN's, but the scores are not multiplied by (0.1 ln factor + 1) squared, as
in the definition of YaRN (Peng et al. 2023, arXiv:2309.00071). torchtitan keeps that factor out of the rotary table on
purpose and lets each model put it into the scale of its softmax: gpt-oss and DeepSeek V3 do, the attention that Llama 3
is built of does not. None of its own Llama configs has this scaling. It would matter for
NousResearch/Yarn-Llama-2-7b-128k: factor 32, hence scores 1.81 times too small.
"""

import math
from typing import Any

from torchtitan.models.common import ComplexRoPE
from torchtitan.models.common.attention import GQAttention, ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_gqa_config

KIND = "Limit"
WHERE = "torchtitan/models/common/attention.py:976"
SHOWS = ("yarn",)
CURE = "multiply the scale of the softmax by the factor's square"
SEEN = ""


def factor_of(rope: Any) -> float:
    return 0.1 * math.log(rope.rope_factor) + 1 if rope.scaling == "yarn" else 1.0


def cure() -> None:
    before = GQAttention.__init__

    def init(self: Any, config: Any) -> None:
        before(self, config)
        self.scaling = self.head_dim**-0.5 * factor_of(config.rope) ** 2

    GQAttention.__init__ = init


if __name__ == "__main__":
    rope = ComplexRoPE.Config(dim=128, max_seq_len=2, scaling="yarn", rope_factor=32.0, original_seq_len=4096)
    config = make_gqa_config(
        dim=128, n_heads=1, head_dim=128, rope=rope, wqkv_param_init={}, wo_param_init={},
        inner_attention=ScaledDotProductAttention.Config(),
    )  # fmt: skip
    attention = config.build()
    scale = attention.scaling * float(attention.rope.cache[0, 0].abs()) ** 2
    print("what a product of query and key is multiplied by, head_dim 128, YaRN's factor 32")
    print(f"torchtitan:   {scale:.4f}")
    print(f"Peng et al.:  {128**-0.5 * factor_of(rope) ** 2:.4f}")
