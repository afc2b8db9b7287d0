"""Bugs of norms, the feed-forward, residuals and the order of layers."""

from typing import Any

from jax import numpy as jnp

from lovely_llama import Config, Params

from ..variants import Words
from .bug import Bug, attention, blocks, feed_forward, fixed, gains, layers

EPS, ROOT = "pass rms_norm_eps", "rsqrt(mean of squares + eps)"
MEAN, RSQRT = "jnp.mean(x32**2)", "x32 * lax.rsqrt(eps + jnp.mean(x32**2))"
ATTENTION_NORM = "vmap(lambda x: rms_norm(x, w.attn_norm, eps))(x)"
ADDED = "x = x + y"
FFN = "x + vmap(lambda x: swiglu(rms_norm(x, w.ffn_norm, eps), *w.ffn))(x)"
FFN_NORM = "rms_norm(x, w.ffn_norm, eps)"
LAST_NORM = "rms_norm(x, params.norm, eps)"
ACTIVATION, SWIGLU = "x32 * lax.logistic(x32)", "silu(gate @ x) * (up @ x)"
SILU, GATED, OWN, SUM = "hidden_act is silu", "silu(gate) * up", "a layer's own weights", "add to the input itself"


def norm(old: str, new: str) -> tuple[Words, ...]:
    return (Words("rms_norm", old, new),)


def block(*changes: tuple[str, str]) -> tuple[Words, ...]:
    return tuple(Words("block", old, new) for old, new in changes)


def activation(new: str) -> tuple[Words, ...]:
    return (Words("silu", ACTIVATION, new),)


def swiglu(new: str) -> tuple[Words, ...]:
    return (Words("swiglu", SWIGLU, new),)


def interleaved(w: Any, _: Config) -> Any:
    """Every other row of gate and up, one below the other."""
    fused = jnp.concatenate([w.gate, w.up])
    return w._replace(gate=fused[::2], up=fused[1::2])


def deinterleaved(w: Any, _: Config) -> Any:
    """The upper and the lower half of gate and up, row by row in turns."""
    fused = jnp.stack([w.gate, w.up], 1).reshape(-1, w.gate.shape[1])
    return w._replace(gate=fused[: len(w.gate)], up=fused[len(w.gate) :])


def has_several(config: Config) -> bool:
    return config.layers > 1


def has_ten(config: Config) -> bool:
    return config.layers > 10


def gain_of_last(params: Params, config: Config) -> Params:
    return params._replace(norm=jnp.ones_like(params.norm))


OF_NORMS = (
    Bug("eps 1e-6", "has 1e-6 in its norms, whatever the config says", EPS, "llama.cpp#2373, lit-llama#339",
        config=fixed(eps=1e-6)),
    Bug("eps 1e-5", "has 1e-5 in its norms, whatever the config says", EPS, "meta-llama#771",
        config=fixed(eps=1e-5)),
    Bug("eps 1e-8", "has 1e-8 in its norms, whatever the config says", EPS, config=fixed(eps=1e-8)),
    Bug("eps 1e-12", "has 1e-12 in its norms, whatever the config says", EPS, config=fixed(eps=1e-12)),
    Bug("eps 1e-3", "has 1e-3 in its norms, whatever the config says", EPS, "a default of keras",
        config=fixed(eps=1e-3)),
    Bug("eps left out", "has no eps in its norms", "eps under the root", "", "inputs that are nearly 0",
        config=fixed(eps=0.0)),
    Bug("eps outside the root", "divides by sqrt(mean) + eps", "sqrt(mean + eps)", "OLMo#281",
        words=norm(RSQRT, f"x32 / (jnp.sqrt({MEAN}) + eps)")),
    Bug("gain left out", "does not multiply by the norms' gains", "multiply by the weight",
        params=gains(jnp.ones_like)),
    Bug("1 + gain", "multiplies by 1 + gain", "multiply by the weight itself", "Gemma's norm, vllm#31464",
        params=gains(lambda g: 1 + g)),
    Bug("gain before the norm", "multiplies by the gain, then normalises", "gain after",
        words=norm(MEAN, "jnp.mean((float32_or_wider(gain) * x32) ** 2)")),
    Bug("LayerNorm", "subtracts the mean, and divides by the standard deviation", "subtract no mean",
        words=norm(RSQRT, "(x32 - x32.mean()) * lax.rsqrt(eps + jnp.var(x32))")),
    Bug("variance for mean square", "divides by the standard deviation", "subtract no mean", "keras#22393",
        words=norm(MEAN, "jnp.var(x32)")),
    Bug("sum for mean", "divides by the root of the sum of squares", "divide by dim",
        words=norm(MEAN, "jnp.sum(x32**2)")),
    Bug("norm without its root", "divides by the mean of squares", "rsqrt", words=norm(RSQRT, f"x32 / (eps + {MEAN})")),
    Bug("divided by rsqrt", "multiplies by the root of the mean of squares", "multiply by rsqrt", "llm-foundry#371",
        words=norm(RSQRT, f"x32 / lax.rsqrt(eps + {MEAN})")),
    Bug("mean square in float16", "computes the mean of squares in float16", "cast to float32 first", "minimind#301",
        "activations above 255 or below 2e-4, to show much", words=norm(
            MEAN, "through(jnp.mean(through(through(x32, jnp.float16) ** 2, jnp.float16)), jnp.float16)")),
    Bug("norm over positions too", "normalises by a mean over all tokens", "normalise each token",
        "llama-from-scratch README:424", words=(
            *norm(MEAN, f"lax.pmean({MEAN}, 'seq')"),
            *block((ATTENTION_NORM, "vmap(lambda x: rms_norm(x, w.attn_norm, eps), axis_name='seq')(x)"),
                   (FFN, f"x + vmap(lambda x: swiglu({FFN_NORM}, *w.ffn), axis_name='seq')(x)")),
            Words("llama", "vmap(lambda x: readout(params, x, config.eps))",
                  "vmap(lambda x: readout(params, x, config.eps), axis_name='seq')"))),
    Bug("attention's norm left out", "attends without a norm", "norm before attention",
        words=block((ATTENTION_NORM, "x"))),
    Bug("feed-forward's norm left out", "has no norm before the feed-forward", "norm before the feed-forward",
        words=block((FFN_NORM, "x"))),
    Bug("norms exchanged", "exchanges a layer's two gains", "input_layernorm comes first", "torchtitan#1454",
        params=blocks(lambda w, _: w._replace(attn_norm=w.ffn_norm, ffn_norm=w.attn_norm))),
    Bug("attention's norm for both", "has attention's gain before the feed-forward too",
        "post_attention_layernorm for the feed-forward",
        params=blocks(lambda w, _: w._replace(ffn_norm=w.attn_norm))),
    Bug("last norm left out", "has no norm before the unembedding", "norm before lm_head",
        "speculators#313, PaddleNLP#7615", words=(Words("readout", LAST_NORM, "x"),)),
    Bug("last norm applied twice", "normalises twice before the unembedding", "hidden_states[-1] is normed already",
        "llama.cpp#1925", words=(Words("readout", LAST_NORM, f"rms_norm({LAST_NORM}, params.norm, eps)"),)),
    Bug("last norm without its gain", "does not multiply by the last norm's gain", "multiply by norm.weight",
        "a weight not loaded", params=gain_of_last),
    Bug("norms after", "normalises each sum, norm(x + f(x))", "norms first", "post-norm", words=block(
        (ATTENTION_NORM, "x"), (ADDED, "x = vmap(lambda x: rms_norm(x, w.attn_norm, eps))(x + y)"),
        (FFN, "vmap(lambda x: rms_norm(x + swiglu(x, *w.ffn), w.ffn_norm, eps))(x)"))),
    Bug("answers normed", "normalises what a layer adds, x + norm(f(x))", "norms first", "OLMo 2's layers", words=block(
        (ATTENTION_NORM, "x"), (ADDED, "x = x + vmap(lambda x: rms_norm(x, w.attn_norm, eps))(y)"),
        (FFN, "x + vmap(lambda x: rms_norm(swiglu(x, *w.ffn), w.ffn_norm, eps))(x)"))),
)  # fmt: skip

OF_FEED_FORWARD = (
    Bug("gate and up exchanged", "takes silu of up, not of gate", GATED, "mlx-lm#767",
        params=feed_forward(lambda w, _: w._replace(gate=w.up, up=w.gate))),
    Bug("gate and up interleaved", "takes every other row of the fused matrix for gate",
        "the fused matrix is gate, then up", "neuronx-nemo-megatron#24", params=feed_forward(interleaved)),
    Bug("gate and up not interleaved", "takes the upper half of a fused matrix for gate, where rows are in turns",
        "every other row is of gate", "", params=feed_forward(deinterleaved)),
    Bug("gelu", "has gelu for silu", SILU, "dlrover#1351, candle#3747", "",
        activation("jax.nn.gelu(x32, approximate=False)")),
    Bug("gelu by tanh", "has the tanh form of gelu for silu", SILU, "candle#3747", "",
        activation("jax.nn.gelu(x32, approximate=True)")),
    Bug("quick gelu", "has x sigmoid(1.702 x) for silu", SILU, words=activation("x32 * lax.logistic(1.702 * x32)")),
    Bug("relu", "has relu for silu", SILU, "PowerInfer#162, BitNet#588", "", activation("jax.nn.relu(x32)")),
    Bug("squared relu", "has relu(x)² for silu", SILU, "BitNet#588", "", activation("jax.nn.relu(x32) ** 2")),
    Bug("leaky relu", "has leaky relu, of slope 0.01, for silu", SILU, words=activation("jax.nn.leaky_relu(x32)")),
    Bug("mish", "has mish for silu", SILU, words=activation("jax.nn.mish(x32)")),
    Bug("sigmoid for silu", "leaves out the factor x of silu", "silu is x sigmoid(x)",
        words=activation("lax.logistic(x32)")),
    Bug("silu of the product", "has silu(gate * up)", "silu of the gate", words=swiglu("silu((gate @ x) * (up @ x))")),
    Bug("no gate", "leaves out silu(gate)", GATED, "sonic-moe#2", "", swiglu("up @ x")),
    Bug("silu of up alone", "has silu(up), and no gate", GATED, words=swiglu("silu(up @ x)")),
    Bug("no up", "has silu(gate) alone", GATED, words=swiglu("silu(gate @ x)")),
    Bug("gate and up added", "has silu(gate) + up", GATED, words=swiglu("silu(gate @ x) + up @ x")),
)  # fmt: skip

OF_WIRING = (
    Bug("attention not added to its input", "has attention's answer in place of the sum", "x + attention",
        words=block((ADDED, "x = y"))),
    Bug("feed-forward not added to its input", "has the feed-forward's answer in place of the sum",
        "x + feed-forward", words=block((FFN, FFN[4:]))),
    Bug("attention added to the norm", "adds attention's answer to the norm of its input", SUM,
        "faster-trajectory-transformer#3, RiNALMo#9", words=block((ADDED, "x = normed + y"))),
    Bug("feed-forward added to the norm", "adds the feed-forward's answer to the norm of its input", SUM,
        "llama3-from-scratch#28", words=block((FFN, f"vmap(lambda x: {FFN_NORM} + swiglu({FFN_NORM}, *w.ffn))(x)"))),
    Bug("both added to their norms", "adds both answers to the norms of their inputs", SUM,
        "faster-trajectory-transformer#3", words=block(
            (ADDED, "x = normed + y"), (FFN, f"vmap(lambda x: {FFN_NORM} + swiglu({FFN_NORM}, *w.ffn))(x)"))),
    Bug("halves in parallel", "feeds the layer's input to attention and feed-forward alike",
        "the feed-forward reads what attention wrote", "GPT-J",
        words=block((FFN, f"{FFN[:-3]}(x - y)"))),
    Bug("feed-forward reads attention alone", "feeds the feed-forward with attention's answer, without the input",
        "it reads the sum", "vllm#12099", words=block((FFN, f"{FFN[:-3]}(y)"))),
    Bug("attention added twice", "adds attention's answer twice", "x + attention", "BitNet#32",
        params=attention(lambda w, _: w._replace(o=2 * w.o))),
)  # fmt: skip

OF_LAYERS = (
    Bug("last layer left out", "runs all layers but the last", "all layers", "", "several layers",
        fits=has_several, params=layers(lambda w: w[:-1])),
    Bug("first layer left out", "runs all layers but the first", "all layers", "", "several layers",
        fits=has_several, params=layers(lambda w: w[1:])),
    Bug("last layer twice", "runs the last layer twice", "each layer once", params=layers(lambda w: (*w, w[-1]))),
    Bug("layers reversed", "runs the layers from last to first", "first to last", "", "several layers",
        fits=has_several, params=layers(lambda w: w[::-1])),
    Bug("layers sorted as text", "runs layer 10 after layer 1", "10 comes after 9", "sorted glob",
        "more than ten layers", fits=has_ten,
        params=layers(lambda w: tuple(w[int(i)] for i in sorted(map(str, range(len(w))))))),
    Bug("one layer's weights for all", "runs the first layer's weights in every layer", OWN, "", "several layers",
        fits=has_several, params=layers(lambda w: w[:1] * len(w))),
    Bug("weights of the next layer", "runs each layer with the weights of the next, and the last with its own", OWN,
        "off by one", "several layers", fits=has_several, params=layers(lambda w: (*w[1:], w[-1]))),
    Bug("weights of the next layer in a circle",
        "runs each layer with the weights of the next, and the last with those of the first", OWN, "off by one",
        "more than two layers, or it is layers reversed", fits=has_several, params=layers(lambda w: (*w[1:], w[0]))),
    Bug("weights of the layer before",
        "runs each layer with the weights of the one before, and the first with its own", OWN, "off by one",
        "several layers", fits=has_several, params=layers(lambda w: (w[0], *w[:-1]))),
)  # fmt: skip
