"""The command `train`: its options, and the checkpoint to resume from."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from lovely_llama import CONFIGS, check

from ..devices.cluster import several
from ..devices.mesh import HELP
from ..devices.processes import again, watched
from ..fast.layers import KEEP
from ..formats.files import RUN
from ..formats.model import DTYPES
from ..interrupts import PARENT
from ..training import loop
from ..training.run_folder import FORMATS, read_fields, steps
from ..training.settings import NUMBERS, Settings, settle
from ..training.step import MATRICES
from .options import ORBAX, READING, add_command, number, whole

ABOUT = """Train a model on DATA, fine-tune one, or resume a run. The run's folder holds the loss curve (loss.png,
metrics.jsonl), sample texts and checkpoints, which transformers reads too. Ctrl-C saves first."""
DATA = """plain text; JSON, in lines (.jsonl) or an array, of conversations {"messages": [{"role": ..., "content": ...},
...]}, also in ShareGPT's or Alpaca's form or as "prompt" and "completion", or of texts {"text": ...}; folders of these;
or token ids as .npy or .bin (default: Python's own standard library)"""
EXAMPLES = """
lovely-llama train book.txt --tokenizer bpe --vocab 512 --steps 500 --out run
lovely-llama train notes.txt --init-from run/best --lora 8 --out tuned
lovely-llama train --resume --out run
"""
EXTRAS = {"train": "the loss curve and TensorBoard events", **READING, "scale": f"{READING['scale']}, and {ORBAX}"}

RUNS = {
    "--out": dict(metavar="RUN", default="run", help="folder of the run (default: run)"),
    "--resume": dict(nargs="?", const="", metavar="STEP", help="continue RUN with its own options, from its last "
                     "checkpoint or from STEP, such as step-500"),
    "--show": dict(action="store_true", help="print the first row of DATA as the model sees it, what is learned of it "
                   "in ⟦ ⟧, and train nothing"),
    "--allow": dict(action="append", default=[], metavar="KEY", help="resume although KEY, an option or a fingerprint, "
                    "has changed; or read a model whose config has this field, which is unknown; may be repeated"),
}  # fmt: skip
# The settings, by group. Their limits are in `training.settings`.
GROUPS = {
    "data": {
        "tokenizer": "a model or folder that has one; or bpe, with --vocab, or chars, to learn one from DATA (default: "
        "that of --init-from, else chars)",
        "vocab": "vocabulary size of a tokenizer that is learned",
        "ctx": "tokens per sequence (default: 256, or the model's context if shorter)",
        "pack": "pack several documents into a sequence; they do not attend to each other",
        "special_tokens": "read the names of special tokens in texts as those tokens, as in texts to which a chat "
        "template has been applied",
        "val_fraction": "share of DATA held out for validation (default: 0.1)",
    },
    "model": {
        "config": "sizes of a published model",
        "init_from": "fine-tune a model: a file, a folder, or a name on Hugging Face's hub",
        "layers": "transformer blocks (default: 4)",
        "heads": "query heads (default: 4)",
        "kv_heads": "key/value heads (default: as many as query heads)",
        "dim": "width of the model (default: 128)",
        "hidden_dim": "width inside the feed-forward (default: 8/3 · dim, rounded up to a multiple of 32)",
        "theta": "base of the rotary frequencies (default: 10000)",
        "tied": "share one matrix between embedding and output (default: yes)",
        "init_std": "standard deviation of initial matrices (default: 0.02)",
        "lora": "train low-rank adapters of rank N instead of all parameters",
        "lora_alpha": "scale the adapters by X / N (default: 2 · N)",
        "lora_targets": f"matrices that get adapters (default: {','.join(MATRICES)})",
    },
    "optimisation": {
        "steps": "optimiser steps (default: 1000)",
        "batch": "sequences per optimiser step (default: 8)",
        "micro_batch": "sequences computed at a time (default: all; fewer on a CPU if their logits are large)",
        "lr": "peak learning rate (default: 3e-4)",
        "final_lr": "learning rate at the end of the cosine (default: a tenth of the peak)",
        "warmup": "steps of linear warm-up (default: a tenth of --steps, at most 100)",
        "weight_decay": "AdamW's weight decay, of all parameters but gains (default: 0.1)",
        "clip": "clip gradients to this norm (default: 1)",
        "beta1": "AdamW's decay rate of the mean gradient (default: 0.9)",
        "beta2": "AdamW's decay rate of the mean squared gradient (default: 0.95)",
        "dtype": "precision of the arithmetic; parameters and optimiser stay float32 (default: float32)",
        "seed": "seed of the initial parameters and of the shuffling (default: 0)",
    },
    "evaluation": {
        "eval_every": "steps between evaluations (default: a tenth of --steps)",
        "eval_batches": "batches per evaluation (default: 32)",
        "patience": "stop after N evaluations without improvement",
        "sample": "length in tokens of the text generated at each evaluation (default: 100)",
    },
    "checkpoints": {
        "save_every": "steps between checkpoints (default: as --eval-every)",
        "keep": "most recent checkpoints to keep, besides the best (default: 2)",
        "checkpoints": "hf: folders that transformers reads; orbax: every process writes what its devices hold, while "
        "training goes on (default: orbax on a mesh or with several processes)",
    },
    "devices": {
        "mesh": HELP,
        "remat": "activations kept for the gradient: matrix products (dots), or each layer's input alone (nothing), "
        "which saves memory and takes longer (default: dots)",
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "config": {"choices": CONFIGS, "metavar": "NAME"},
    "init_from": {"metavar": "MODEL"},
    "tokenizer": {"metavar": "PATH"},
    "pack": {"action": "store_true", "default": None},
    "special_tokens": {"action": "store_true", "default": None},
    "tied": {"action": argparse.BooleanOptionalAction, "default": None},
    "lora_targets": {"metavar": "A,B"},
    "dtype": {"choices": [*DTYPES]},
    "remat": {"choices": [*KEEP]},
    "mesh": {"metavar": "AXIS=N,…"},
    "checkpoints": {"choices": FORMATS},
    **{
        name: {"type": whole, "metavar": "N"} if bound.whole else {"type": number, "metavar": "X"}
        for name, bound in NUMBERS.items()
    },
}


def add(commands: Any) -> None:
    """Add the command. An option that is not given is None, so that a resume can tell; `settings` has the defaults."""
    options = {
        title: {f"--{name.replace('_', '-')}": {"help": says, **KINDS[name]} for name, says in group.items()}
        for title, group in GROUPS.items()
    }
    data = {"data": {"data": dict(metavar="DATA", nargs="*", help=DATA), **options.pop("data")}, "run": RUNS}
    what = "train a model, or fine-tune one"
    add_command(commands, "train", what, train, data | options, about=ABOUT, examples=EXAMPLES, extras=EXTRAS)


def train(args: argparse.Namespace) -> int:
    """Start or resume a run. The exit status is 128 + n if signal n ended it early."""
    if several() and PARENT not in os.environ:
        return watched(again(sys.argv[1:]), [{}], math.inf)  # a parent for this process
    folder, resuming = Path(args.out), args.resume is not None
    settings = settle(given(args), read_fields(folder / RUN)["options"] if resuming else {})
    if args.show:
        print(loop.show(settings, args.allow))
        return 0
    at = chosen_step(folder, args.resume)
    return loop.train(settings, folder, at, resuming, args.allow, args.debug)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among the arguments; options that are not given are absent."""
    return {name: value for name in Settings._fields if (value := getattr(args, name)) not in (None, [])}


def chosen_step(folder: Path, resume: str | None) -> int | None:
    """The step of the checkpoint to resume from: STEP or the last; None if there is none."""
    if resume is None:
        return None
    found = steps(folder)
    names: dict[str, int | None] = {"": found[-1] if found else None, **{f"step-{n}": n for n in found}}
    said = ", ".join(f"step-{n}" for n in found) or "no step, as there is no checkpoint"
    check("resume", repr(resume), resume in names, f"{said}; DATA stand before --resume", folder)
    return names[resume]
