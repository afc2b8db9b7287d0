"""`diff_models`: what another model's tensors are to ours is found; changes are made with torch, in files' matrices."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from builders import SMALL, layers_of, random_params
from jax import numpy as jnp

from lovely_llama import Config, Params
from lovely_llama_tools import from_llama2c, save, to_llama2c
from lovely_llama_tools.commands import main
from lovely_llama_tools.comparing.checkpoints.relations import RELATIONS
from lovely_llama_tools.comparing.checkpoints.tensors import Differences, diff_models
from lovely_llama_tools.formats.model import Model

# Square matrices, and rows that 32 divides.
SQUARE = Config(
    vocab=40, dim=192, layers=3, kv_heads=3, q_per_kv=2, head_dim=32, hidden_dim=192, ctx=64, eps=1e-5, theta=1e4,
    rope_scaling=None, tied=False,
)  # fmt: skip
NAMES = {
    "attention.wq": "attn.q", "attention.wk": "attn.k", "attention.wv": "attn.v", "attention.wo": "attn.o",
    "feed_forward.w1": "ffn.gate", "feed_forward.w2": "ffn.down", "feed_forward.w3": "ffn.up",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
Tensors = dict[str, Any]  # torch's, by the names of a layer in Meta's files, or all by their whole names
Change = Callable[[Tensors, Config], Tensors]


@functools.cache
def model(config: Config, seed: int = 0) -> Model:
    return Model(config, random_params(config, seed), None)


def arrays_of(ours: Model) -> Tensors:
    return {name: torch.tensor(array) for name, array in to_llama2c(ours.params, ours.config).items()}


def compare(ours: Model, arrays: Tensors) -> Differences:
    """Compare with a model of other tensors, and write the result as JSON."""
    theirs = {name: array.contiguous() for name, array in arrays.items()}
    found = diff_models(ours, ours._replace(params=from_llama2c(theirs, ours.config)))
    json.dumps(found._asdict(), allow_nan=False)
    return found


def in_layers(ours: Model, change: Change) -> Tensors:
    """All tensors, those of each layer changed."""
    arrays = arrays_of(ours)
    for i in range(ours.config.layers):
        layer = {name: arrays[f"layers.{i}.{name}.weight"] for name in NAMES}
        arrays |= {f"layers.{i}.{name}.weight": array for name, array in change(layer, ours.config).items()}
    return arrays


def relations(found: Differences, unlike: bool = False) -> dict[str, str]:
    """What is said of each tensor, which must be the same in all layers, unless they may be unlike."""
    said = [(name, group["relation"]) for group in found.tensors for name in group["names"]]
    assert unlike or len(dict(said)) == len(said), found
    return dict(said)


# ---- Ways in which converters go wrong -------------------------------------------------------------------------------


def permute(w: Any, heads: int) -> Any:
    """As transformers' convert_llama_weights_to_hf.py."""
    rows, columns = w.shape
    return w.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def unpermute(w: Any, heads: int) -> Any:
    rows, columns = w.shape
    return w.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def both(change: Callable[[Any, int], Any]) -> Change:
    """A change of q and k, by the number of their heads."""
    return lambda w, c: {
        "attention.wq": change(w["attention.wq"], c.kv_heads * c.q_per_kv),
        "attention.wk": change(w["attention.wk"], c.kv_heads),
    }


def one(name: str, change: Callable[[Any, Config], Any]) -> Change:
    return lambda w, c: {name: change(w[name], c)}


def tiled(w: Any, c: Config) -> Any:
    """Heads of q in the order that `repeat` makes of keys, where `repeat_interleave` is right."""
    return torch.einsum("gk...->kg...", w.view(c.kv_heads, c.q_per_kv, c.head_dim, -1).view(
        c.q_per_kv, c.kv_heads, c.head_dim, -1)).reshape(w.shape)  # fmt: skip


def untiled(w: Any, c: Config) -> Any:
    return w.view(c.kv_heads, c.q_per_kv, c.head_dim, -1).transpose(0, 1).reshape(w.shape)


def exchange(a: str, b: str) -> Change:
    return lambda w, _: {a: w[b], b: w[a]}


def fused(w: Tensors, _: Config) -> Tensors:
    both = torch.cat([w["feed_forward.w1"], w["feed_forward.w3"]])
    return {"feed_forward.w1": both[::2], "feed_forward.w3": both[1::2]}


def unfused(w: Tensors, _: Config) -> Tensors:
    both = torch.stack([w["feed_forward.w1"], w["feed_forward.w3"]], 1).flatten(0, 1)
    half = len(both) // 2
    return {"feed_forward.w1": both[:half], "feed_forward.w3": both[half:]}


def turned(w: Any, c: Config) -> Any:
    """As the transpose is stored, in the shape that the matrix has."""
    return w.T.reshape(w.shape)


Q, K, V, WO = "attention.wq", "attention.wk", "attention.wv", "attention.wo"
HF, AGAIN = "rows in Hugging Face's order", "rows permuted back once more"
WAYS: dict[str, tuple[Change, dict[str, str]]] = {
    "not permuted back": (both(permute), {"attn.q": HF, "attn.k": HF}),
    "permuted back without need": (both(unpermute), {"attn.q": AGAIN, "attn.k": AGAIN}),
    "permuted twice": (
        both(lambda w, heads: permute(permute(w, heads), heads)), dict.fromkeys(["attn.q", "attn.k"], "rows permuted "
                                                                                "twice")),
    "permuted back twice more": (
        both(lambda w, heads: unpermute(unpermute(w, heads), heads)),
        dict.fromkeys(["attn.q", "attn.k"], "rows permuted back twice more")),
    "v permuted": (one(V, lambda w, c: permute(w, c.kv_heads)), {"attn.v": HF}),
    "k by the number of queries": (
        one(K, lambda w, c: unpermute(permute(w, c.kv_heads), c.kv_heads * c.q_per_kv)),
        {"attn.k": "rows permuted by the number of query heads"}),
    "o permuted": (one(WO, lambda w, c: permute(w.T, c.kv_heads * c.q_per_kv).T),
                   {"attn.o": "columns in Hugging Face's order"}),
    "o permuted back": (one(WO, lambda w, c: unpermute(w.T, c.kv_heads * c.q_per_kv).T),
                        {"attn.o": "columns permuted back"}),
    "groups": (lambda w, c: {Q: tiled(w[Q], c), WO: tiled(w[WO].T, c).T},
               dict.fromkeys(["attn.q", "attn.o"], "heads grouped the other way")),
    "groups back": (lambda w, c: {Q: untiled(w[Q], c), WO: untiled(w[WO].T, c).T},
                    dict.fromkeys(["attn.q", "attn.o"], "heads grouped the other way, back")),
    "transposed": (lambda w, c: {name: turned(w[name], c) for name in NAMES if w[name].ndim > 1},
                   {name: "transposed" for name in NAMES.values() if "norm" not in name}),
    "transposed in Hugging Face's order": (
        both(lambda w, heads: unpermute(turned(permute(w, heads), SMALL), heads)),
        dict.fromkeys(["attn.q", "attn.k"], "transposed in Hugging Face's order")),
    "every other row": (fused, dict.fromkeys(["ffn.gate", "ffn.up"], "every other row of gate above up")),
    "rows in turns": (unfused, dict.fromkeys(["ffn.gate", "ffn.up"], "half of the rows of gate and up in turns")),
    "k and v": (exchange(K, V), {"attn.k": "exchanged with attn.v", "attn.v": "exchanged with attn.k"}),
    "k and v in Hugging Face's order": (
        lambda w, c: {K: unpermute(w[V], c.kv_heads), V: permute(w[K], c.kv_heads)},
        {"attn.k": f"exchanged with attn.v, {AGAIN}", "attn.v": f"exchanged with attn.k, {HF}"}),
    "gate and up": (exchange("feed_forward.w1", "feed_forward.w3"),
                    {"ffn.gate": "exchanged with ffn.up", "ffn.up": "exchanged with ffn.gate"}),
    "gate twice": (lambda w, _: {"feed_forward.w3": w["feed_forward.w1"]}, {"ffn.up": "that of ffn.gate"}),
    "norms": (exchange("attention_norm", "ffn_norm"),
              {"attn_norm": "exchanged with ffn_norm", "ffn_norm": "exchanged with attn_norm"}),
    "Gemma's gains": (lambda w, _: {name: w[name] - 1 for name in ("attention_norm", "ffn_norm")},
                      dict.fromkeys(["attn_norm", "ffn_norm"], "less 1")),
    "scores scaled": (one(Q, lambda w, c: w / math.sqrt(c.head_dim)), {"attn.q": "× {:.6g}"}),
    "negative": (one(Q, lambda w, _: -w), {"attn.q": "× -1"}),
    "a permutation of heads": (
        one(K, lambda w, c: w.view(c.kv_heads, -1, c.dim).flip(0).reshape(w.shape)), {"attn.k": "heads permuted"}),
    "a permutation within heads": (
        one(K, lambda w, c: w.view(c.kv_heads, -1, c.dim).flip(1).reshape(w.shape)),
        {"attn.k": "rows of each head alike permuted"}),
    "neurons": (
        lambda w, _: {"feed_forward.w1": w["feed_forward.w1"].flip(0), "feed_forward.w2": w["feed_forward.w2"].flip(1)},
        {"ffn.gate": "rows permuted", "ffn.down": "columns permuted"}),
    "a gain's numbers": (one("ffn_norm", lambda w, _: w.roll(3)), {"ffn_norm": "rows permuted"}),
    "one head for all": (one(K, lambda w, c: w[: c.head_dim].repeat(c.kv_heads, 1)),
                         {"attn.k": "heads of ours, some more than once"}),
}  # fmt: skip
ROUNDED: dict[str, Callable[[Any], Any]] = {
    "": lambda w: w,
    "rounded to bfloat16": lambda w: w.bfloat16().float(),
    "rounded to float16": lambda w: w.half().float(),
    "truncated to bfloat16": lambda w: (w.contiguous().view(torch.int32) & -0x10000).view(torch.float32),
}


CASES = [(config, name, "") for config in (SMALL, SQUARE) for name in WAYS] + [
    (SMALL, name, rounding) for rounding in ROUNDED for name in WAYS if rounding == "rounded to bfloat16"
    or (rounding and name in ("k and v in Hugging Face's order", "groups", "scores scaled", "negative", "neurons"))
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "rounding"), CASES)
def test_what_a_converter_did(config: Config, name: str, rounding: str) -> None:
    """Whatever dtype the result was then written in."""
    if name == "k by the number of queries":
        config = SQUARE  # twice whose number of query heads divides the rows of k
    ours, (change, want) = model(config), WAYS[name]
    want = {key: text.format(1 / math.sqrt(config.head_dim)) for key, text in want.items()}

    def changed(w: Tensors, c: Config) -> Tensors:
        return {key: ROUNDED[rounding](array) for key, array in change(w, c).items()}

    found = compare(ours, in_layers(ours, changed))
    got = relations(found)
    if name == "scores scaled" and rounding:  # then the factor is known to fewer digits
        assert abs(float(got["attn.q"].split()[1].rstrip(",")) * math.sqrt(config.head_dim) - 1) < 0.01, found
        assert got["attn.q"].endswith(f", {rounding}") or rounding == "truncated to bfloat16", found
        return
    if rounding == "truncated to bfloat16" and name == "negative":
        want["attn.q"] = "× -1"
    assert got == {key: f"{text}, {rounding}".removesuffix(", ") for key, text in want.items()}, found
    assert all(group["layers"] == [*range(config.layers)] and group["of"] is None for group in found.tensors)
    assert found.verdict == "different" and all(group["rest"] == 0 for group in found.tensors), found


def test_each_relation_of_the_table_is_among_them() -> None:
    told = " | ".join(text for _, want in WAYS.values() for text in want.values())
    assert not [relation.name for relation in RELATIONS if relation.name not in told]


# ---- Layers, embeddings, shapes, configs -----------------------------------------------------------------------------


def test_the_same() -> None:
    ours = model(SMALL)
    found = compare(ours, arrays_of(ours))
    assert found.verdict == "same" and not found.config and not found.tensors and found.compared == 21
    assert str(found) == "The same: the config, and all 21 tensors"


@pytest.mark.parametrize("config", [SMALL, SQUARE], ids=["small", "square"])
@pytest.mark.parametrize("seed", range(1, 4))
def test_other_numbers_get_no_name(config: Config, seed: int) -> None:
    found = compare(model(config), arrays_of(model(config, seed)))
    assert set(relations(found).values()) == {"other numbers"}, found
    assert all(group["error"] == group["rest"] > 0.3 for group in found.tensors)
    assert len(relations(found)) == 12 and str(found).endswith("no tensor the same")


@pytest.mark.parametrize(("config", "size"), [(SMALL, 1e-4), (SMALL, 3e-3), (SMALL, 0.05), (SQUARE, 3e-3)])
def test_nearly_the_same_numbers_are_no_rounding(config: Config, size: float) -> None:
    """Neither where they are as near as a dtype would be, nor written in one."""
    ours, rng = model(config), torch.Generator().manual_seed(0)
    near = {name: w * (1 + size * torch.randn(w.shape, generator=rng)) for name, w in arrays_of(ours).items()}
    for rounded in (lambda w: w, ROUNDED["rounded to bfloat16"]):
        found = compare(ours, {name: rounded(w) for name, w in near.items()})
        few = config == SMALL and size == 1e-4  # for 14 numbers, bfloat16 does explain this
        assert {text for name, text in relations(found, few).items() if not few or "norm" not in name} == {
            "nearly the same numbers"}, found  # fmt: skip


def test_a_change_of_a_few_numbers_is_not_hidden_by_rounding() -> None:
    ours = model(SQUARE)
    arrays = {name: w.bfloat16().float() for name, w in arrays_of(ours).items()}
    arrays["tok_embeddings.weight"][7] = 1.0
    arrays["tok_embeddings.weight"][11, 3] += 0.5
    arrays["output.weight"] = arrays_of(ours)["output.weight"]
    arrays["output.weight"][0, 0] += 1e-3
    found = relations(compare(ours, arrays))
    assert found["embed"] == "other numbers in 2 of 40 rows (7, 11), the rest rounded to bfloat16", found
    assert found["unembed"] == "other numbers in 1 of 40 rows (0)", found
    assert found["norm"] == found["ffn.down"] == "rounded to bfloat16", found


def test_blocks_of_gguf() -> None:
    """The gguf package's own rounding; what is finer than ours is called so, and other blocks get no name."""
    ours = model(SQUARE)

    def quantised(kind: str) -> Tensors:
        def through(w: Any) -> Any:
            blocks = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[kind])
            return torch.tensor(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))

        return {name: through(w) if w.ndim > 1 else w for name, w in arrays_of(ours).items()}

    matrices = {"embed", "unembed", *(name for name in NAMES.values() if "norm" not in name)}
    for kind, says in (("Q8_0", "rounded to Q8_0 blocks"), ("Q4_0", "nearly the same numbers")):
        found = compare(ours, quantised(kind))
        assert relations(found) == dict.fromkeys(matrices, says), found
        reverse = compare(ours._replace(params=from_llama2c(quantised(kind), SQUARE)), arrays_of(ours))
        says = f"finer; ours are theirs {says}" if kind == "Q8_0" else says
        assert relations(reverse) == dict.fromkeys(matrices, says), reverse


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_of_the_parameters_themselves(dtype: Any) -> None:
    """Whichever of the two has the narrower one."""
    ours = model(SMALL)
    theirs = ours._replace(params=jax.tree.map(lambda w: w.astype(dtype), ours.params))
    name = np.dtype(dtype).name
    assert set(relations(diff_models(ours, theirs)).values()) == {f"rounded to {name}"}
    assert set(relations(diff_models(theirs, ours)).values()) == {f"finer; ours are theirs rounded to {name}"}
    assert diff_models(theirs, theirs).verdict == "same"


DEEP = replace(SMALL, layers=12)


@pytest.mark.parametrize(("order", "says", "layers"), [
    ([*range(1, 12), 0], "those of layers 1-11, 0", 12), ([*range(11, -1, -1)], "those of layers 11-0", 12),
    ([0] * 12, "that of layer 0", 11), (sorted(range(12), key=str), "those of layers 10-11, 2-9", 10),
])  # fmt: skip
def test_layers_in_another_order(order: list[int], says: str, layers: int) -> None:
    ours = model(DEEP)
    arrays = right = arrays_of(ours)
    for i, j in enumerate(order):
        arrays = arrays | {f"layers.{i}.{name}.weight": right[f"layers.{j}.{name}.weight"] for name in NAMES}
    for rounding in ("", "rounded to bfloat16"):
        found = compare(ours, {n: ROUNDED[rounding](w) if "layers" in n else w for n, w in arrays.items()})
        moved = [group for group in found.tensors if group["of"]]
        assert len(moved) == 1 and len(moved[0]["names"]) == 9 and len(moved[0]["layers"]) == layers, found
        assert moved[0]["relation"] == f"{says}, {rounding}".removesuffix(", "), found
        assert moved[0]["of"] == [order[i] for i in moved[0]["layers"]]
        assert f"all tensors: {says}" in str(found)


def test_one_layer_fewer_or_more() -> None:
    ours, theirs = model(DEEP), model(replace(DEEP, layers=11))
    theirs = theirs._replace(params=ours.params._replace(blocks=layers_of(ours.params)[1:]))
    found = diff_models(ours, theirs)
    assert found.config == [{"name": "layers", "theirs": 11, "ours": 12}]
    assert [group["relation"] for group in found.tensors] == ["those of layers 1-11"], found
    found = diff_models(theirs, ours)
    first = found.tensors[0]
    assert first["relation"] == "other numbers" or first["of"], found
    assert {g["relation"]: g["layers"] for g in found.tensors}["those of layers 0-10"] == [*range(1, 12)], found


def test_head_dims_at_which_permutations_are_alike() -> None:
    """Both are named: with 8 rows a head, permuting twice is permuting back."""
    ours = model(replace(SQUARE, head_dim=8))
    found = relations(compare(ours, in_layers(ours, both(permute))))
    assert found["attn.q"] == found["attn.k"] == f"{HF} or rows permuted back twice more", found
    ours = model(replace(SQUARE, head_dim=4))
    assert relations(compare(ours, in_layers(ours, both(permute))))["attn.q"] == f"{HF} or {AGAIN}"


def test_embeddings() -> None:
    """Rows of the vocabulary permuted; scaled, and written in float16; of another size; tied."""
    ours = model(SMALL)
    arrays = arrays_of(ours)
    found = compare(ours, arrays | {"tok_embeddings.weight": arrays["tok_embeddings.weight"].roll(1, 0)})
    assert relations(found) == {"embed": "rows permuted"}
    assert found.tensors[0]["permutation"][:3] == [[0, 28], [1, 0], [2, 1]]
    assert "embed: rows permuted (0 is ours' 28, 1 is ours' 0, " in str(found) and "…)" in str(found)
    scaled = (arrays["tok_embeddings.weight"] * 14**0.5).half().float()
    said = relations(compare(ours, arrays | {"tok_embeddings.weight": scaled}))["embed"]
    assert said.startswith("× 3.74") and said.endswith(", rounded to float16"), said
    exchanged = {"tok_embeddings.weight": arrays["output.weight"], "output.weight": arrays["tok_embeddings.weight"]}
    assert relations(compare(ours, arrays | exchanged)) == {
        "embed": "exchanged with unembed", "unembed": "exchanged with embed"}  # fmt: skip
    larger = model(replace(SMALL, vocab=32))
    grown = larger.params._replace(embed=jnp.concatenate([ours.params.embed, jnp.zeros((3, 14))]))
    found = diff_models(ours, larger._replace(params=ours.params._replace(embed=grown.embed, unembed=grown.unembed)))
    assert found.config == [{"name": "vocab", "theirs": 32, "ours": 29}]
    assert relations(found) == {
        "embed": "shape [32, 14], ours [29, 14]; the first 29 rows equal",
        "unembed": "shape [32, 14], ours [29, 14]; the first 29 rows other numbers",
    }
    tied = Model(replace(SMALL, tied=True), ours.params._replace(unembed=None), None)
    assert relations(diff_models(ours, tied)) == {"unembed": "that of embed, theirs is tied to the embedding"}
    assert relations(diff_models(tied, ours)) == {"unembed": "other numbers; ours is tied to the embedding"}
    twice = ours._replace(params=ours.params._replace(unembed=ours.params.embed))
    assert relations(diff_models(twice, tied)) == {"unembed": "equal; theirs is tied to the embedding"}
    assert diff_models(tied, tied).verdict == "same"


def test_configs() -> None:
    """Fields that differ are told, those of a scaling by themselves, but not the rounding of a number in a file."""
    ours = model(SMALL)
    assert SMALL.rope_scaling
    other = replace(SMALL, theta=1e4, rope_scaling=SMALL.rope_scaling._replace(factor=8.0), eps=float(np.float32(3e-4)))
    found = diff_models(ours, ours._replace(config=other))
    assert found.verdict == "different" and not found.tensors
    assert found.config == [
        {"name": "theta", "theirs": 1e4, "ours": 700.0}, {"name": "rope_scaling.factor", "theirs": 8.0, "ours": 3.0}
    ]  # fmt: skip
    assert "config: theta is 10000.0, ours 700.0\n" in str(found) and "21 other tensors the same" in str(found)
    plain = diff_models(ours, ours._replace(config=replace(SMALL, rope_scaling=None)))
    assert plain.config == [{"name": "rope_scaling", "theirs": None, "ours": SMALL.rope_scaling._asdict()}]
    heads = replace(SMALL, kv_heads=4, q_per_kv=3)  # as many query heads: the matrices of q and o fit
    params = random_params(heads, 1)
    blocks = [
        block._replace(attn=block.attn._replace(q=own.attn.q.reshape(block.attn.q.shape)))
        for own, block in zip(layers_of(ours.params), layers_of(params), strict=True)
    ]
    found = diff_models(ours, Model(heads, params._replace(blocks=tuple(blocks)), None))
    assert "attn.q" not in relations(found), found
    assert relations(found)["attn.k"] == "shape [40, 14], ours [30, 14]; the first 30 rows other numbers", found


def test_numbers_that_are_none() -> None:
    ours = model(SMALL)

    def broken(params: Params, value: float) -> Params:
        return params._replace(embed=params.embed.at[3, 5].set(value).at[4, 0].set(value))

    theirs = ours._replace(params=broken(ours.params, jnp.nan))
    assert relations(diff_models(ours, theirs)) == {"embed": "NaN in theirs at [3, 5] and 1 more"}
    assert relations(diff_models(theirs, ours)) == {"embed": "NaN in ours at [3, 5] and 1 more"}
    assert diff_models(theirs, theirs).verdict == "different"
    large = ours._replace(params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), broken(ours.params, jnp.inf)))
    found = relations(diff_models(ours, large))
    assert found["embed"] == "∞ in theirs at [3, 5] and 1 more; rounded to bfloat16", found
    assert found["norm"] == "rounded to bfloat16"
    json.dumps(diff_models(ours, theirs)._asdict(), allow_nan=False)


def test_the_command_compares_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = random_params(SMALL)
    save(Model(SMALL, params, None), tmp_path / "ours")
    wrong = jax.tree.map_with_path(lambda path, w: 2 * w if path[-1].name == "up" else w, params)
    save(Model(SMALL, wrong, None), tmp_path / "theirs.gguf")
    command = ["diff", str(tmp_path / "ours")]
    assert main([*command, str(tmp_path / "ours")]) == 0
    assert main([*command, str(tmp_path / "theirs.gguf"), "--json"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("The same: the config, and all ")
    told = json.loads(out[out.index("{") :])
    (group,) = told["tensors"]
    assert group["names"] == ["ffn.up"] and group["layers"] == [0, 1] and group["relation"] == "× 2"
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "theirs.gguf").read_bytes()[:-999])
    for name in ("cut.gguf", "none"):
        assert main([*command, str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / name}: ") and said.count("\n") == 1
