"""The catalogue of bugs: each shows on the probe, none looks like another; in transformers they do as here."""

import math
from typing import Any

import numpy as np
import pytest
from builders import SMALL, random_params
from foreign import BY_FUNCTIONS, BY_PARTS, WIRINGS, in_transformers

import lovely_llama as ll
from lovely_llama_tools.comparing.bugs import BUGS, SECTIONS, with_bug
from lovely_llama_tools.comparing.golden import PROBES, parameters, prompt
from lovely_llama_tools.comparing.variants import Words, variant
from lovely_llama_tools.formats.model import Model

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


@pytest.mark.parametrize("name", [*BY_PARTS, *BY_FUNCTIONS, *WIRINGS])
def test_a_bug_in_transformers_gives_the_logits_of_ours(name: str) -> None:
    params, ids = random_params(SMALL), np.array([3, 1, 0, 4, 1, 5, 9, 2, 6, 5, 3, 0, 5] * 7)
    with in_transformers(Model(SMALL, params, None), name) as run:
        theirs = run(ids).numpy()
    ours = np.asarray(with_bug(BUGS[name], params, ids, SMALL).logits())
    right = np.asarray(ll.logits(params, ids, SMALL))
    assert distance(theirs, ours) < 1e-5
    assert distance(ours, right) > 3e-5 or name == "layers sorted as text"  # of two layers
