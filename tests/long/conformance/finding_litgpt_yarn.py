"""YaRN's ramp is turned round.

The fast pairs of each head are slowed by the factor and the slow ones left as they are, where the paper (Peng et al.
2023, arXiv:2309.00071, section 3.2) leaves the fast ones and slows the slow ones. It matters for every checkpoint with
a yarn scaling, such as NousResearch/Yarn-Llama-2-7b-128k (factor 32) or deepseek-ai/DeepSeek-V3 (factor 40), for which
it was added; none of the configs that litgpt carries has one. Its test against transformers (tests/test_yarn.py) hands
litgpt's own table to both models, and only prints how far the two tables are apart.
"""

import inspect

import torch
from litgpt import model

KIND = "Fault"
WHERE = "litgpt/model.py:1021"
SHOWS = ("yarn",)
CURE = "take 1 - ramp for the share of the unscaled frequencies"
SEEN = ""


def cure() -> None:
    """Compile the function anew with that line changed."""
    line = "theta_extrapolation_factor = ramp_func"
    exec(inspect.getsource(model.build_rope_cache).replace(line, line.replace("ramp", "1 - ramp")), vars(model))


if __name__ == "__main__":
    yarn = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 4096}
    caches = [model.build_rope_cache(2, 128, extra_config=extra) for extra in (None, yarn)]
    unscaled, scaled = (torch.atan2(sin[1], cos[1]) for cos, sin in caches)
    fast, slow = (scaled / unscaled)[[0, 63]].tolist()
    print("speed of the fastest and the slowest pair, as a multiple of that without scaling, factor 32:")
    print(f"litgpt:    {fast:.5f} and {slow:.5f}")
    print(f"the paper: {1:.5f} and {1 / 32:.5f}")
