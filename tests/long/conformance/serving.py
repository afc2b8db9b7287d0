"""What runs in a program's own environment: its logits on every checkpoint, as files of numpy's.

A program is `load(folder, dtype)`, `logits(model, ids)` of one pass, `decode(model, ids)`, one token at a time with its
own cache, and `gradient(model, ids)`, of the mean cross-entropy of each token given those before it, with respect to
the embedding. What is left out is not asked for.
"""

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def serve(
    package: str,
    load: Callable[[Path, str], Any],
    logits: Callable[[Any, list[int]], Any],
    decode: Callable[[Any, list[int]], Any] | None = None,
    gradient: Callable[[Any, list[int]], Any] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> None:
    """Run the checks that a file asks for, under the cures that it names: `run_PROGRAM.py JOB.json`. `dtypes`: those in
    which it can be fed."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    warnings.simplefilter("ignore")
    for name in job["cures"]:
        importlib.import_module(name).cure()
    known = {"whole": logits, "cache": decode or absent, "gradient": gradient or absent}
    for folder, checks in job["checkpoints"].items():
        for dtype in dtypes:
            asked = [check for check in checks if check["dtype"] == dtype and known[check["how"]] is not absent]
            model: Any = None
            for check in asked:
                path = out / check["file"]
                try:
                    model = model or load(Path(folder), dtype)
                    np.save(f"{path}.npy", plain(known[check["how"]](model, job["prompts"][str(check["prompt"])])))
                except Exception as error:  # of a foreign program: the row says what it was
                    said = " ".join(f"{type(error).__name__}: {error}".split())
                    Path(f"{path}.error").write_text(said)
                    print(f"{path.name}: {said[:300]}", file=sys.stderr)
    (out / "version").write_text(package if " " in package else version(package))


def absent(model: Any, ids: list[int]) -> Any:
    """What a program does not have."""
    raise NotImplementedError


def read_config(folder: Path, kinds: Sequence[str], head_dim: bool = True) -> dict[str, Any]:
    """config.json for a program whose config is made by hand, with theta and the scaling under "rope", whichever way
    they are spelt. What it has no field for is refused: a kind of scaling, or heads that together are not as wide."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}
    config["rope"] = {"rope_type": "default", **rope}
    if config["rope"]["rope_type"] not in ("default", *kinds):
        raise ValueError(f"no {config['rope']['rope_type']} scaling")
    if not head_dim and config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError("no explicit head_dim")
    return config


def plain(array: Any) -> Any:
    """Rows of float32, whoever made them."""
    array = array.detach().float().cpu().numpy() if hasattr(array, "detach") else np.asarray(array, np.float32)
    return array[0] if array.ndim == 3 else array


def torch_gradient(rows: Any, ids: list[int], embedding: Any) -> Any:
    """The gradient of the mean cross-entropy of rows of torch's, with respect to the embedding."""
    import torch

    loss = torch.nn.functional.cross_entropy(rows[:-1].float(), torch.tensor(ids[1:]))
    return torch.autograd.grad(loss, embedding)[0]
