"""The catalogue of bugs: each shows on the probe, none looks like another; in transformers they do as here."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builders import SMALL, random_params
from transformers import LlamaConfig, LlamaForCausalLM

import lovely_llama as ll
from lovely_llama_tools import config_to_hf, to_hf
from lovely_llama_tools.comparing.bugs import BUGS, SECTIONS, with_bug
from lovely_llama_tools.comparing.golden import PROBES, parameters, prompt
from lovely_llama_tools.comparing.variants import Words, variant

ALIKE: set[frozenset[str]] = {  # in float32, on any model: an eps this small is none
    frozenset(("eps 1e-8", "eps 1e-12")), frozenset(("eps 1e-8", "eps left out")),
    frozenset(("eps 1e-12", "eps left out")),
}  # fmt: skip
NEVER = {"positions from 1"}


def distance(a: Any, b: Any) -> float:
    """Of the last rows that both have, those with NaN left out."""
    count = min(len(a), len(b))
    a, b = np.asarray(a, np.float64)[-count:], np.asarray(b, np.float64)[-count:]
    rows = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    return float(np.linalg.norm(a[rows] - b[rows]) / np.linalg.norm(b[rows])) if rows.any() else math.nan


def test_every_bug_shows_on_the_probe_and_none_looks_like_another() -> None:
    """On one of its models, within its prompt, ten times above rounding: most in the first tokens, the others in all.

    What never shows is rounding everywhere."""
    found = dict[str, dict[str, Any]]()
    for name, probe in PROBES.items():
        params, ids, config = parameters(probe), prompt(probe), probe.config
        bugs = [bug for bug in BUGS.values() if not bug.fits or bug.fits(config)]
        for part in ("first", "all"):
            tokens = ids[:48] if part == "first" else ids
            rows = found[f"{name}, {part}"] = {"": np.asarray(ll.logits(params, tokens, config))}
            rows |= {bug.name: np.asarray(with_bug(bug, params, tokens, config).logits()) for bug in bugs}
            bugs = [bug for bug in bugs if distance(rows[bug.name], rows[""]) < 5e-5]
    names = ["", *BUGS]
    for i, a in enumerate(names):
        for b in names[:i]:
            both = [rows for rows in found.values() if a in rows and b in rows]
            apart = [distance(rows[a], rows[b]) for rows in both if len(rows[a]) == len(rows[b])]
            assert not any(math.isnan(x) for x in apart), (a, b)
            if frozenset((a, b)) in ALIKE:
                assert max(apart) < 3e-5, (a, b)
            elif apart and not {a, b} & NEVER:
                assert max(apart) > 5e-5, (a, b, apart)
    assert all(distance(rows["positions from 1"], rows[""]) < 1e-5 for rows in found.values())


def test_what_a_bug_of_rotation_leaves_alone() -> None:
    """The first token has one key, so that no rotation and no scale of scores can change its logits."""
    params, ids = random_params(SMALL), np.arange(1, 9)
    want = np.asarray(ll.logits(params, ids, SMALL))[0]
    scores = [bug for bug in SECTIONS["Scores, mask, softmax"] if bug.name.startswith("scores s")]
    for bug in (*SECTIONS["Rotary frequencies and angles"], *SECTIONS["Rotation"], *scores):
        if not bug.fits or bug.fits(SMALL):
            got = np.asarray(with_bug(bug, params, ids, SMALL).logits())[0]
            assert distance(got[None], want[None]) < 1e-5, bug.name
    for bug in SECTIONS["Feed-forward"]:
        assert distance(np.asarray(with_bug(bug, params, ids, SMALL).logits())[:1], want[None]) > 1e-3, bug.name


def test_the_library_is_not_touched() -> None:
    before, functions = dict(vars(ll)), set[Any]()
    for bug in BUGS.values():
        functions |= {function for function, *_ in bug.words}
        variant(bug.words, {"through": None})
    assert dict(vars(ll)) == before
    assert functions <= set(vars(ll)) and len(functions) > 9
    with pytest.raises(ValueError, match="silu: 'x32' occurs 3 times"):
        variant([Words("silu", "x32", "x")])


def test_every_row_says_what_it_is() -> None:
    """Names are unique, each row has a change, a sentence and a cure, and names nothing that only its author knows."""
    assert sum(map(len, SECTIONS.values())) == len(BUGS) >= 150
    for bug in BUGS.values():
        assert bug.words or bug.config or bug.params or bug.tokens, bug.name
        assert bug.does and bug.cure and bug.does[0].islower() and not bug.does.endswith("."), bug.name


# ---- The same in transformers ----------------------------------------------------------------------------------------


def settings(**changes: Any) -> Callable[[Any], Any]:
    """Another config."""

    def change(parts: Any) -> Any:
        parts["config"] |= changes

    return change


def rope(**changes: Any) -> Callable[[Any], Any]:
    """Other rotary parameters."""

    def change(parts: Any) -> Any:
        parts["config"]["rope_parameters"] |= changes

    return change


def tensors(change: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
    """Other tensors."""

    def changed(parts: Any) -> Any:
        parts["tensors"] = {name: change(name, tensor) for name, tensor in parts["tensors"].items()}

    return changed


def exchanged(one: str, other: str) -> Callable[[Any], Any]:
    """The tensors of two names exchanged."""

    def change(parts: Any) -> Any:
        found = parts["tensors"]
        parts["tensors"] = {
            name: found[name.replace(one, other) if one in name else name.replace(other, one)] for name in found
        }

    return change


def permuted(axes: tuple[int, int]) -> Callable[[str, Any], Any]:
    """Rows of q and k permuted: a head's width as these two axes, exchanged."""

    def change(name: str, tensor: Any) -> Any:
        rotary = "q_proj" in name or "k_proj" in name
        return tensor.reshape(-1, *axes, SMALL.dim).swapaxes(1, 2).reshape(-1, SMALL.dim) if rotary else tensor

    return change


to_meta, to_halves = permuted((2, SMALL.head_dim // 2)), permuted((SMALL.head_dim // 2, 2))


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


THEIRS: dict[str, Callable[[Any], Any]] = {
    "theta 1e4": rope(rope_theta=1e4), "scaling left out": rope(rope_type="default"),
    "all pairs slowed alike": rope(rope_type="linear"), "scaling by another model's factor": rope(factor=8.0),
    "eps 1e-6": settings(rms_norm_eps=1e-6), "eps 1e-3": settings(rms_norm_eps=1e-3),
    "gelu": settings(hidden_act="gelu"), "gelu by tanh": settings(hidden_act="gelu_pytorch_tanh"),
    "quick gelu": settings(hidden_act="quick_gelu"), "relu": settings(hidden_act="relu"),
    "squared relu": settings(hidden_act="relu2"), "leaky relu": settings(hidden_act="leaky_relu"),
    "mish": settings(hidden_act="mish"), "sigmoid for silu": settings(hidden_act="sigmoid"),
    "last layer left out": settings(num_hidden_layers=1),
    "gate and up exchanged": exchanged("gate_proj", "up_proj"), "k and v exchanged": exchanged("k_proj", "v_proj"),
    "norms exchanged": exchanged("input_layernorm", "post_attention_layernorm"),
    "layers reversed": exchanged("layers.0.", "layers.1."),
    "Meta's rows rotated as halves": tensors(to_meta),
    "Hugging Face's rows rotated as neighbours": tensors(to_halves),
    "gain left out": tensors(lambda name, x: torch.ones_like(x) if "norm" in name else x),
    "1 + gain": tensors(lambda name, x: 1 + x if "norm" in name else x),
    "attention added twice": tensors(lambda name, x: 2 * x if "o_proj" in name else x),
    "weights rounded to bfloat16": tensors(lambda name, x: x if "norm" in name else x.bfloat16().float()),
    "unembedding taken from the embedding": tied,
    "id 0 taken for padding": padded, "first token hidden": first_hidden, "no mask": all_seen,
}  # fmt: skip


def oracle_with(name: str | None, settings: Any = None) -> tuple[Any, Callable[[Any], Any]]:
    """transformers' model with the parameters of ours and a bug, or other settings; and what makes its mask."""
    params = random_params(SMALL)
    fields = {key: value for key, value in config_to_hf(SMALL).items() if key not in ("rope_theta", "rope_scaling")}
    parts: dict[str, Any] = {"config": fields, "mask": lambda ids: None}
    parts["tensors"] = {key: torch.tensor(np.array(tensor)) for key, tensor in to_hf(params, SMALL).items()}
    if name:
        THEIRS[name](parts)
    for key, value in (settings or {}).items():
        (fields["rope_parameters"] if key == "rope_theta" else parts["config"])[key] = value
    config: Any = LlamaConfig(**(parts["config"] | {"num_attention_heads": 2}))  # 12 heads do not divide dim
    config.num_attention_heads = SMALL.kv_heads * SMALL.q_per_kv
    model: Any = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(parts["tensors"], strict=False)
    model.tie_weights()
    return model, parts["mask"]


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_a_bug_in_transformers_gives_the_logits_of_ours(name: str) -> None:
    params, ids = random_params(SMALL), np.array([3, 1, 0, 4, 1, 5, 9, 2, 6, 5, 3, 0, 5] * 7)
    model, mask = oracle_with(name)
    tokens = torch.tensor(ids)[None]
    theirs = model(tokens, attention_mask=mask(tokens)).logits[0].numpy()
    ours = np.asarray(with_bug(BUGS[name], params, ids, SMALL).logits())
    right = np.asarray(ll.logits(params, ids, SMALL))
    assert distance(theirs, ours) < 1e-5 < 3e-5 < distance(ours, right)
