"""The numbers of the llama3 scaling are constants.

`ModelArgs` has only `use_scaled_rope`; the factor 8, the low and high factors 1 and 4 and the original context 8192
stand in the code. They are those of Llama 3.1 and 3.3. The package's list of models sets it for meta-llama/Llama-3.2-1B
and meta-llama/Llama-3.2-3B too, which state a factor of 32 in config.json: for these two the slow pairs turn 4 times
too fast here. In the checkpoint of the table it is the original context that is another one.
"""

from llama_models.llama3 import model

KIND = "Fault"
WHERE = "llama_models/llama3/model.py:47"
SHOWS = ("llama3",)
CURE = "put the checkpoint's original context into the place of 8192"
SEEN = "meta-llama/llama-models#166, meta-llama/llama-models#241"


def cure() -> None:
    code = model.apply_scaling.__code__
    constants = tuple(64 if constant == 8192 else constant for constant in code.co_consts)
    model.apply_scaling.__code__ = code.replace(co_consts=constants)


if __name__ == "__main__":
    table = model.precompute_freqs_cis(64, 2, theta=5e5, use_scaled=True)
    print("the slowest pair of Llama 3.2 1B (theta 500000, head_dim 64), radians per position")
    print(f"llama-models:           {table[1, -1].angle():.3e}")
    print(f"config.json, factor 32: {5e5 ** (-62 / 64) / 32:.3e}")
