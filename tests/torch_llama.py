"""A Llama in torch in the manner of llama2.c: neighbouring rotary pairs, one sequence, methods that tests can replace.

It is another program than ours and transformers': what `diff` says of it tells how `diff` does on programs it has not
seen.
"""

import math
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from lovely_llama import Config, Params
from lovely_llama_tools import to_llama2c


class TorchLlama:
    """A function from ids to logits."""

    def __init__(self, params: Params, config: Config, dtype: Any = torch.float32) -> None:
        self.c, self.dtype = config, dtype
        self.heads = config.kv_heads * config.q_per_kv
        self.w = {name: torch.tensor(array).to(dtype) for name, array in to_llama2c(params, config).items()}
        self.order = list(range(config.layers))

    def replaced(self, **methods: Any) -> "TorchLlama":
        """The same with other methods."""
        for name, method in methods.items():
            setattr(self, name, MethodType(method, self))
        return self

    def exponents(self) -> Any:
        return 2 * torch.arange(self.c.head_dim // 2) / self.c.head_dim

    def frequencies(self) -> Any:
        f, s = 1 / self.c.theta ** self.exponents().double(), self.c.rope_scaling
        if s is None:
            return f.float()
        assert s.kind == "llama3"
        turns = s.original_ctx * f / (2 * math.pi)
        kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
        return (kept * f + (1 - kept) * f / s.factor).float()

    def angles(self, count: int) -> Any:
        return torch.outer(torch.arange(count).float(), self.frequencies())

    def rotate(self, x: Any, angles: Any) -> Any:
        a, b = x.float()[..., ::2], x.float()[..., 1::2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    def norm(self, x: Any, gain: Any) -> Any:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.c.eps)).to(x.dtype) * gain

    def repeat(self, x: Any) -> Any:
        return x.repeat_interleave(self.c.q_per_kv, 1)

    def weights(self, scores: Any) -> Any:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def merge(self, heads: Any) -> Any:
        return heads.transpose(0, 1).reshape(heads.shape[1], -1)

    def attention(self, x: Any, at: str, angles: Any) -> Any:
        q, k, v = ((x @ self.w[f"{at}attention.w{name}.weight"].T).view(len(x), -1, self.c.head_dim) for name in "qkv")
        q, k, v = self.rotate(q, angles), self.rotate(k, angles), self.turn_values(v, angles)
        q, k, v = (y.transpose(0, 1) for y in (q, self.repeat(k), self.repeat(v)))
        scores = q.float() @ k.float().transpose(1, 2) / math.sqrt(self.c.head_dim)
        heads = (self.weights(scores) @ v.float()).to(x.dtype)
        return self.merge(heads) @ self.w[f"{at}attention.wo.weight"].T

    def turn_values(self, v: Any, angles: Any) -> Any:
        return v

    def feed_forward(self, x: Any, at: str) -> Any:
        gate, up, down = (self.w[f"{at}feed_forward.w{i}.weight"] for i in (1, 3, 2))
        return self.gated(x @ gate.T, x @ up.T) @ down.T

    def gated(self, gate: Any, up: Any) -> Any:
        return self.act(gate) * up

    def act(self, x: Any) -> Any:
        return functional.silu(x)

    def block(self, x: Any, at: str, angles: Any) -> Any:
        x = x + self.attention(self.norm(x, self.w[f"{at}attention_norm.weight"]), at, angles)
        return x + self.feed_forward(self.norm(x, self.w[f"{at}ffn_norm.weight"]), at)

    def embed(self, ids: Any) -> Any:
        return self.w["tok_embeddings.weight"][ids]

    @property
    def unembed(self) -> Any:
        return self.w["tok_embeddings.weight" if self.c.tied else "output.weight"]

    def readout(self, x: Any) -> Any:
        return self.norm(x, self.w["norm.weight"]) @ self.unembed.T

    @torch.no_grad()
    def __call__(self, ids: Any) -> Any:
        x, angles = self.embed(torch.tensor(ids).long()), self.angles(len(ids))
        for layer in self.order:
            x = self.block(x, f"layers.{layer}.", angles)
        return self.readout(x)
