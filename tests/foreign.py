"""Programs that are not ours with bugs in them: transformers' Llama, and a torch Llama in the manner of llama2.c.

A bug is put into transformers by its config, its tensors or its mask (`BY_PARTS`), or by another function of its module
(`BY_FUNCTIONS`); `UNLISTED` are faults that the catalogue does not have. Names are the catalogue's.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch_llama import TorchLlama
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from lovely_llama import Config, Params
from lovely_llama_tools import config_to_hf, to_hf
from lovely_llama_tools.comparing.candidates import bos_of
from lovely_llama_tools.formats.model import Model

Change = Callable[[Any], Any]  # of the parts of a model: "config", "tensors", "mask"
Patch = Callable[[pytest.MonkeyPatch], None]
TorchChange = Callable[[TorchLlama], Any]

# ---- transformers ----------------------------------------------------------------------------------------------------


def oracle_with(
    name: str | None, params: Params, config: Config, fields: Any = None
) -> tuple[Any, Callable[[Any], Any]]:
    """transformers' model with some parameters and a bug, or other fields; and what makes its mask."""
    own = {key: value for key, value in config_to_hf(config).items() if key not in ("rope_theta", "rope_scaling")}
    parts: dict[str, Any] = {"config": own, "mask": lambda ids: None}
    parts["tensors"] = {key: torch.tensor(np.array(tensor)) for key, tensor in to_hf(params, config).items()}
    if name:
        BY_PARTS[name](parts)
    for key, value in (fields or {}).items():
        (own["rope_parameters"] if key in own["rope_parameters"] else own)[key] = value
    fields_of: dict[str, Any] = own | {"num_attention_heads": 2}  # others need not divide dim
    made: Any = LlamaConfig(**fields_of)
    made.num_attention_heads = config.kv_heads * config.q_per_kv
    model: Any = LlamaForCausalLM(made).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(parts["tensors"], strict=False)
    model.tie_weights()
    return model, parts["mask"]


@contextmanager
def in_transformers(model: Model, name: str | None, dtype: Any = torch.float32) -> Generator[Callable[[Any], Any]]:
    """A function from ids to logits: transformers' Llama with a bug or an unlisted fault, or with none."""
    with pytest.MonkeyPatch.context() as patch:
        if function := (BY_FUNCTIONS | UNLISTED).get(name or ""):
            function(patch)
        if name in WIRINGS:
            patch.setattr(modeling_llama.LlamaDecoderLayer, "forward", layer(WIRINGS[name]))
        net, mask = oracle_with(name if name in BY_PARTS else None, model.params, model.config)
        yield AROUND.get(name or "", plainly)(run(net.to(dtype), mask), model)


def layer(change: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' layer by another wiring."""

    def forward(self: Any, hidden_states: Any, **more: Any) -> Any:
        def attend(x: Any) -> Any:
            return self.self_attn(hidden_states=x, **more)[0]

        return change(hidden_states, attend, self.mlp, self.input_layernorm, self.post_attention_layernorm)

    return forward


def run(net: Any, mask: Callable[[Any], Any] = lambda ids: None) -> Callable[[Any], Any]:
    """transformers' model as a function from ids to logits."""

    @torch.no_grad()
    def logits(ids: Any) -> Any:
        tokens = torch.tensor(np.array(ids)).long()[None]
        return net(tokens, attention_mask=mask(tokens)).logits[0]

    return logits


def settings(**changes: Any) -> Change:
    """Another config."""

    def change(parts: Any) -> Any:
        parts["config"] |= changes

    return change


def rope(**changes: Any) -> Change:
    """Other rotary parameters."""

    def change(parts: Any) -> Any:
        parts["config"]["rope_parameters"] |= changes

    return change


def tensors(change: Callable[[str, Any], Any]) -> Change:
    """Other tensors."""

    def changed(parts: Any) -> Any:
        parts["tensors"] = {name: change(name, tensor) for name, tensor in parts["tensors"].items()}

    return changed


def exchanged(one: str, other: str) -> Change:
    """The tensors of two names exchanged."""

    def change(parts: Any) -> Any:
        found = parts["tensors"]
        parts["tensors"] = {
            name: found[name.replace(one, other) if one in name else name.replace(other, one)] for name in found
        }

    return change


def permuted(to_meta: bool) -> Change:
    """Rows of q and k from halves to neighbouring pairs, or back."""

    def change(parts: Any) -> None:
        half = parts["config"]["head_dim"] // 2

        def rows(x: Any) -> Any:
            return x.reshape(-1, *((2, half) if to_meta else (half, 2)), x.shape[-1]).swapaxes(1, 2).reshape(x.shape)

        tensors(lambda name, x: rows(x) if "q_proj" in name or "k_proj" in name else x)(parts)

    return change


def ordered(order: Callable[[int], Any]) -> Change:
    """Other layers in their places, by the number of layers."""

    def change(parts: Any) -> None:
        places, found = [*order(parts["config"]["num_hidden_layers"])], parts["tensors"]
        parts["config"]["num_hidden_layers"] = len(places)
        parts["tensors"] = {name: x for name, x in found.items() if ".layers." not in name}
        for new, old in enumerate(places):
            at = f"model.layers.{old}."
            parts["tensors"] |= {
                name.replace(at, f"model.layers.{new}."): x for name, x in found.items() if name.startswith(at)
            }

    return change


def regrouped(*names: str) -> Change:
    """Heads of some matrices in the order of their places in a group."""

    def change(parts: Any) -> None:
        c = parts["config"]
        kv_heads, width = c["num_key_value_heads"], c["head_dim"]

        def heads(x: Any) -> Any:
            return x.reshape(c["num_attention_heads"] // kv_heads, kv_heads, width, -1).swapaxes(0, 1).reshape(x.shape)

        def each(name: str, x: Any) -> Any:
            if not any(part in name for part in names):
                return x
            return heads(x) if "q_proj" in name else heads(x.T.contiguous()).T.contiguous()

        tensors(each)(parts)

    return change


def padded(parts: Any) -> Any:
    """A mask that takes id 0 for padding."""
    parts["mask"] = lambda ids: (ids != 0).long()


def all_seen(parts: Any) -> Any:
    """A mask that hides nothing."""
    parts["mask"] = lambda ids: torch.zeros(1, 1, ids.shape[1], ids.shape[1])


def first_hidden(parts: Any) -> Any:
    parts["mask"] = lambda ids: (torch.arange(ids.shape[1]) > 0).long()[None]


def tied(parts: Any) -> Any:
    parts["config"] |= {"tie_word_embeddings": True}
    parts["tensors"]["lm_head.weight"] = parts["tensors"]["model.embed_tokens.weight"]


BY_PARTS: dict[str, Change] = {
    "theta 1e4": rope(rope_theta=1e4), "scaling left out": rope(rope_type="default"),
    "all pairs slowed alike": rope(rope_type="linear"), "scaling by another model's factor": rope(factor=8.0),
    "eps 1e-6": settings(rms_norm_eps=1e-6), "eps 1e-3": settings(rms_norm_eps=1e-3),
    "gelu": settings(hidden_act="gelu"), "gelu by tanh": settings(hidden_act="gelu_pytorch_tanh"),
    "quick gelu": settings(hidden_act="quick_gelu"), "relu": settings(hidden_act="relu"),
    "squared relu": settings(hidden_act="relu2"), "leaky relu": settings(hidden_act="leaky_relu"),
    "mish": settings(hidden_act="mish"), "sigmoid for silu": settings(hidden_act="sigmoid"),
    "last layer left out": ordered(lambda n: range(n - 1)), "first layer left out": ordered(lambda n: range(1, n)),
    "one layer's weights for all": ordered(lambda n: [0] * n),
    "weights of the layer before": ordered(lambda n: [0, *range(n - 1)]),
    "layers sorted as text": ordered(lambda n: sorted(range(n), key=str)),
    "gate and up exchanged": exchanged("gate_proj", "up_proj"), "k and v exchanged": exchanged("k_proj", "v_proj"),
    "norms exchanged": exchanged("input_layernorm", "post_attention_layernorm"),
    "layers reversed": ordered(lambda n: range(n)[::-1]),
    "Meta's rows rotated as halves": permuted(True),
    "Hugging Face's rows rotated as neighbours": permuted(False),
    "gain left out": tensors(lambda name, x: torch.ones_like(x) if "norm" in name else x),
    "1 + gain": tensors(lambda name, x: 1 + x if "norm" in name else x),
    "attention added twice": tensors(lambda name, x: 2 * x if "o_proj" in name else x),
    "weights rounded to bfloat16": tensors(lambda name, x: x if "norm" in name else x.bfloat16().float()),
    "weights rounded to float16": tensors(lambda name, x: x if "norm" in name else x.half().float()),
    "last norm without its gain": tensors(lambda name, x: torch.ones_like(x) if name == "model.norm.weight" else x),
    "query heads grouped the other way": regrouped("q_proj", "o_proj"), "q grouped the other way": regrouped("q_proj"),
    "o grouped the other way": regrouped("o_proj"),
    "unembedding taken from the embedding": tied,
    "id 0 taken for padding": padded, "first token hidden": first_hidden, "no mask": all_seen,
}  # fmt: skip


def replaced(name: str, change: Callable[[Any], Any]) -> Patch:
    """Another function in transformers' modeling_llama, made from the right one."""
    return lambda patch: patch.setattr(modeling_llama, name, change(getattr(modeling_llama, name)))


def method(owner: str, name: str, change: Callable[[Any], Any]) -> Patch:
    """Another method of one of its classes."""
    where = getattr(modeling_llama, owner)
    return lambda patch: patch.setattr(where, name, change(getattr(where, name)))


def rotary(change: Callable[[Any, Any], Any]) -> Patch:
    """Other cosines and sines."""
    return method("LlamaRotaryEmbedding", "forward", lambda right: lambda self, *a, **o: change(*right(self, *a, **o)))


def norm(change: Callable[[Any, Any, float], Any]) -> Patch:
    """Another norm of x, by gain and eps."""
    new = lambda self, x: change(x, self.weight, self.variance_epsilon)  # noqa: E731
    return method("LlamaRMSNorm", "forward", lambda right: new)


def feed_forward(change: Callable[[Any, Any], Any]) -> Patch:
    """Another function of the module and its input."""
    return method("LlamaMLP", "forward", lambda right: change)


def attended(change: Callable[..., Any]) -> Patch:
    """Other weights from scores, before the mask is added, and the mask."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        weights = change(query @ key.transpose(2, 3) * scaling, mask, module)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights

    return replaced("eager_attention_forward", lambda right: forward)


def embedded(patch: pytest.MonkeyPatch) -> None:
    """The embedding scaled."""
    right = torch.nn.Embedding.forward
    patch.setattr(torch.nn.Embedding, "forward", lambda self, ids: right(self, ids) * self.embedding_dim**0.5)


BY_FUNCTIONS: dict[str, Patch] = {
    "embedding scaled by sqrt(dim)": embedded,
    "rotated backwards": rotary(lambda cos, sin: (cos, -sin)),
    "rotation left out": rotary(lambda cos, sin: (cos * 0 + 1, sin * 0)),
    "rotation without its sines": rotary(lambda cos, sin: (cos, sin * 0)),
    "cosines and sines in bfloat16": rotary(lambda cos, sin: (cos.bfloat16().to(cos), sin.bfloat16().to(sin))),
    "keys not rotated": replaced("apply_rotary_pos_emb", lambda right: lambda q, k, *a, **o: (right(q, k, *a)[0], k)),
    "queries not rotated": replaced(
        "apply_rotary_pos_emb", lambda right: lambda q, k, *a, **o: (q, right(q, k, *a)[1])),
    "scores not scaled": attended(lambda s, mask, m: torch.softmax(s * math.sqrt(m.head_dim) + mask, -1)),
    "scores scaled by dim": attended(
        lambda s, mask, m: torch.softmax(s * math.sqrt(m.head_dim / m.config.hidden_size) + mask, -1)),
    "mask after softmax": attended(lambda s, mask, m: torch.softmax(s, -1) * (mask == 0)),
    "softmax over queries": attended(lambda s, mask, m: torch.softmax(s + mask, -2)),
    "each token sees itself alone": attended(lambda s, mask, m: torch.eye(s.shape[-1]).expand(s.shape)),
    "an attention sink": attended(lambda s, mask, m: torch.softmax(functional.pad(s + mask, (0, 1)), -1)[..., :-1]),
    "LayerNorm": norm(lambda x, g, eps: functional.layer_norm(x, x.shape[-1:], g, None, eps)),
    "gain before the norm": norm(lambda x, g, eps: functional.rms_norm(g * x, x.shape[-1:], None, eps)),
    "eps outside the root": norm(lambda x, g, eps: g * x / (x.pow(2).mean(-1, True).sqrt() + eps)),
    "sum for mean": norm(lambda x, g, eps: g * x * torch.rsqrt(x.pow(2).sum(-1, True) + eps)),
    "no gate": feed_forward(lambda m, x: m.down_proj(m.up_proj(x))),
    "gate and up added": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) + m.up_proj(x))),
    "silu of the product": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x) * m.up_proj(x)))),
}  # fmt: skip
UNLISTED: dict[str, Patch] = {
    "a bias": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)) + 0.1),
    "tanh for silu": feed_forward(lambda m, x: m.down_proj(torch.tanh(m.gate_proj(x)) * m.up_proj(x))),
    "the square of up": feed_forward(lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x) ** 2)),
    "a norm by the largest": norm(lambda x, g, eps: g * x / x.abs().amax(-1, True)),
    "cube roots": norm(lambda x, g, eps: g * x / (x.abs().pow(3).mean(-1, True) + eps) ** (1 / 3)),
    "distances": attended(lambda s, mask, m: torch.softmax(s + mask - torch.arange(s.shape[-1]).flip(0) * 0.1, -1)),
    "weights of 1.5": attended(lambda s, mask, m: torch.softmax(s + mask, -1) ** 1.5),
    "dropped scores": attended(lambda s, mask, m: torch.softmax(torch.where(s > 1, 0.0, s) + mask, -1)),
    "sines halved": rotary(lambda cos, sin: (cos, sin / 2)),
    "values of a bias": attended(lambda s, mask, m: torch.softmax(s + mask, -1) + 0.01),
}


# ---- A torch Llama in the manner of llama2.c -------------------------------------------------------------------------


def in_torch(model: Model, name: str | None, dtype: Any = torch.float32) -> Callable[[Any], Any]:
    """The same of the other program."""
    net = TorchLlama(model.params, model.config, dtype)
    if name in IN_TORCH:
        IN_TORCH[name](net)
    if name in WIRINGS:
        net.replaced(block=wired(WIRINGS[name]))
    return AROUND.get(name or "", plainly)(net, model)


def methods(**changes: Any) -> TorchChange:
    return lambda model: model.replaced(**changes)


def wired(change: Callable[..., Any]) -> Callable[..., Any]:
    """A layer by another wiring."""

    def new(self: Any, x: Any, at: str, angles: Any) -> Any:
        first, second = (partial(self.norm, gain=self.w[f"{at}{which}_norm.weight"]) for which in ("attention", "ffn"))
        return change(x, lambda y: self.attention(y, at, angles), lambda y: self.feed_forward(y, at), first, second)

    return new


def square(name: str) -> TorchChange:
    """A matrix transposed."""

    def change(model: TorchLlama) -> None:
        model.w |= {key: w.T.contiguous() for key, w in model.w.items() if f".{name}." in key}

    return change


def one_short(self: Any, scores: Any) -> Any:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(0)
    return scores.masked_fill(later, -1e9).softmax(-1)


def last_norm(times: int) -> TorchChange:
    """The last norm, so many times."""

    def readout(m: Any, x: Any) -> Any:
        for _ in range(times):
            x = m.norm(x, m.w["norm.weight"])
        return x @ m.unembed.T

    return methods(readout=readout)


IN_TORCH: dict[str, TorchChange] = {
    "exponent over dim": methods(exponents=lambda m: 2 * torch.arange(m.c.head_dim // 2) / m.c.dim),
    "exponent 2(i+1)/d": methods(exponents=lambda m: 2 * (torch.arange(m.c.head_dim // 2) + 1) / m.c.head_dim),
    "positions divided by 2": methods(angles=lambda m, n: torch.outer(torch.arange(n) / 2, m.frequencies())),
    "angles in bfloat16": methods(
        angles=lambda m, n: torch.outer(torch.arange(n).float(), m.frequencies()).bfloat16().float()),
    "values rotated": methods(turn_values=lambda m, v, angles: m.rotate(v, angles)),
    "query heads grouped the other way": methods(repeat=lambda m, x: x.repeat(1, m.c.q_per_kv, 1)),
    "heads not transposed back": methods(merge=lambda m, heads: heads.reshape(heads.shape[1], -1)),
    "mask one short, the first row an average": methods(weights=one_short),
    "masked scores are 0, not -inf": methods(weights=lambda m, s: s.tril().softmax(-1)),
    "last norm left out": last_norm(0), "last norm applied twice": last_norm(2),
    "embedding scaled by sqrt(dim)": methods(
        embed=lambda m, ids: m.w["tok_embeddings.weight"][ids] * math.sqrt(m.c.dim)),
    "layers sorted as text": lambda m: m.order.sort(key=str), "layers reversed": lambda m: m.order.reverse(),
    "last layer left out": lambda m: m.order.pop(), "last layer twice": lambda m: m.order.append(m.order[-1]),
    "relu": methods(act=lambda m, x: functional.relu(x)), "gelu": methods(act=lambda m, x: functional.gelu(x)),
    "silu of up alone": methods(gated=lambda m, gate, up: functional.silu(up)),
    "o transposed": square("wo"), "q transposed, Meta's rows": square("wq"),
    "eps outside the root": methods(
        norm=lambda m, x, gain: (x.float() / (x.float().pow(2).mean(-1, True).sqrt() + m.c.eps)).to(x.dtype) * gain),
    "1 + gain": methods(
        norm=lambda m, x, gain: functional.rms_norm(x.float(), x.shape[-1:], 1 + gain.float(), m.c.eps).to(x.dtype)),
}  # fmt: skip


# ---- Of either -------------------------------------------------------------------------------------------------------


def add_then_norm(x: Any, attend: Any, feed: Any, first: Any, second: Any) -> Any:
    x = first(x + attend(x))
    return second(x + feed(x))


# Of x, attention, feed-forward and the two norms.
WIRINGS: dict[str, Callable[..., Any]] = {
    "attention not added to its input": lambda x, a, f, n, o: (y := a(n(x))) + f(o(y)),
    "feed-forward not added to its input": lambda x, a, f, n, o: f(o(x + a(n(x)))),
    "attention added to the norm": lambda x, a, f, n, o: (z := n(x) + a(n(x))) + f(o(z)),
    "feed-forward added to the norm": lambda x, a, f, n, o: o(z := x + a(n(x))) + f(o(z)),
    "halves in parallel": lambda x, a, f, n, o: x + a(n(x)) + f(o(x)),
    "feed-forward reads attention alone": lambda x, a, f, n, o: x + (y := a(n(x))) + f(o(y)),
    "norms after": add_then_norm,
    "attention's norm left out": lambda x, a, f, n, o: (z := x + a(x)) + f(o(z)),
    "attention's norm for both": lambda x, a, f, n, o: (z := x + a(n(x))) + f(n(z)),
}  # fmt: skip


def plainly(run: Callable[[Any], Any], model: Model) -> Callable[[Any], Any]:
    return run


def given(change: Callable[[Any, Model], Any]) -> Callable[..., Any]:
    """Other ids."""
    return lambda run, model: lambda ids: run(change(np.array(ids), model))


def told(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Something else made of the logits."""
    return lambda run, model: lambda ids: change(run(ids))


AROUND: dict[str, Callable[[Callable[[Any], Any], Model], Callable[[Any], Any]]] = {
    "ids one too high": given(lambda ids, m: (ids + 1) % m.config.vocab),
    "ids one too low": given(lambda ids, m: (ids - 1) % m.config.vocab),
    "BOS put in front": given(lambda ids, m: np.append([bos_of(m)], ids)),
    "two BOS put in front": given(lambda ids, m: np.append([bos_of(m)] * 2, ids)),
    "first token lost": given(lambda ids, m: ids[1:]), "tokens in reverse": given(lambda ids, m: ids[::-1].copy()),
    "log-probabilities": told(lambda x: x.log_softmax(-1)), "probabilities": told(lambda x: x.softmax(-1)),
    "logits of the position before": told(lambda x: torch.cat([x[:1] * torch.nan, x[:-1]])),
    "logits of the next position": told(lambda x: torch.cat([x[1:], x[:1] * torch.nan])),
}  # fmt: skip
TRANSFORMERS = (*BY_PARTS, *BY_FUNCTIONS, *WIRINGS, *AROUND)
TORCH = (*IN_TORCH, *WIRINGS, *AROUND)
