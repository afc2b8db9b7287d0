"""What a training run is told: its options, what follows from them, and the model that they describe."""

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from lovely_llama import CONFIGS, Config, __version__, check, check_config

from .cluster import processes, several
from .fast.layers import KEEP
from .formats import DTYPES
from .learn import MATRICES, Recipe
from .mesh import HELP, check_rows, make_mesh, parse_mesh
from .options import number, whole
from .runs import FORMATS

# What --init-from leaves no choice of.
MODEL = ("layers", "heads", "kv_heads", "dim", "hidden_dim", "theta", "tied", "init_std")


class Settings(NamedTuple):
    """All options; a field is an option's name. None: whatever `settle` makes of it, or nothing."""

    data: tuple[str, ...] = ()
    config: str | None = None
    init_from: str | None = None
    tokenizer: str | None = None
    vocab: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    dim: int | None = None
    hidden_dim: int | None = None
    theta: float | None = None
    tied: bool | None = None
    init_std: float | None = None
    ctx: int | None = None
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: str = ",".join(MATRICES)
    batch: int = 8
    micro_batch: int | None = None
    steps: int = 1000
    lr: float = 3e-4
    final_lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    dtype: str = "float32"
    remat: str = "dots"
    seed: int = 0
    pack: bool = False
    val_fraction: float = 0.1
    eval_every: int | None = None
    eval_batches: int | None = 32
    save_every: int | None = None
    keep: int = 2
    patience: int | None = None
    sample: int = 100
    mesh: str | None = None
    checkpoints: str | None = None


class Bound(NamedTuple):
    """The numbers that an option takes, and what it does."""

    kind: Callable[[str], int | float]
    says: str
    least: float
    most: float = math.inf
    strict: bool = False  # above the least
    below: bool = False  # below the most

    def check(self, name: str, value: Any) -> None:
        inside = math.isfinite(value) and self.least <= value <= self.most
        inside = inside and not (self.strict and value == self.least) and not (self.below and value == self.most)
        upper = "" if self.most == math.inf else f" {'below' if self.below else 'to'} {self.most}"
        what = "a whole number" if self.kind is whole else "a number"
        check(name, value, inside, f"{what} {'above' if self.strict else 'from'} {self.least}{upper}")


TOP = 2**31 - 1
LOGITS = 2**23  # a row of 256 with a vocabulary of 32,000: 8 rows of it are 1.2 times as fast one by one as together
NUMBERS = {
    "vocab": Bound(whole, "tokens of a tokenizer that is trained on DATA", 1, TOP),
    "layers": Bound(whole, "blocks (default: 4)", 1, TOP),
    "heads": Bound(whole, "query heads (default: 4)", 1, TOP),
    "kv_heads": Bound(whole, "key/value heads (default: as many as --heads)", 1, TOP),
    "dim": Bound(whole, "width (default: 128)", 1, TOP),
    "hidden_dim": Bound(whole, "width within the feed-forward (default: ⅔ · 4 · dim, up to a multiple of 32)", 1, TOP),
    "theta": Bound(number, "the base of rotary frequencies (default: 10000)", 1, strict=True),
    "init_std": Bound(number, "standard deviation of new matrices (default: 0.02)", 0, strict=True),
    "ctx": Bound(whole, "tokens of a row (default: 256, or the model's context if that is shorter)", 1, TOP),
    "lora": Bound(whole, "train adapters of rank N in place of the model", 1, TOP),
    "lora_alpha": Bound(number, "scale them by X / N (default: 2 N)", 0, strict=True),
    "batch": Bound(whole, "rows of a step (default: 8)", 1, TOP),
    "micro_batch": Bound(whole, "of them computed at a time (default: all; fewer on a CPU if they are large)", 1, TOP),
    "steps": Bound(whole, "steps (default: 1000)", 1, TOP),
    "lr": Bound(number, "the highest learning rate (default: 3e-4)", 0, strict=True),
    "final_lr": Bound(number, "the last one, down a cosine (default: a tenth)", 0),
    "warmup": Bound(whole, "steps up to the highest (default: a tenth of all, at most 100)", 0, TOP),
    "weight_decay": Bound(number, "of all but the gains of norms (default: 0.1)", 0),
    "clip": Bound(number, "the largest norm of a gradient (default: 1)", 0, strict=True),
    "beta1": Bound(number, "AdamW's decay of the mean gradient (default: 0.9)", 0, 1, below=True),
    "beta2": Bound(number, "and of the mean square (default: 0.95)", 0, 1, below=True),
    "seed": Bound(whole, "of the first parameters and the order of data (default: 0)", 0, 2**32 - 1),
    "val_fraction": Bound(number, "of DATA, for validation (default: 0.1)", 0, 1, below=True),
    "eval_every": Bound(whole, "steps between evaluations (default: a tenth of all)", 1, TOP),
    "eval_batches": Bound(whole, "batches of an evaluation (default: 32)", 1, TOP),
    "save_every": Bound(whole, "steps between checkpoints (default: as --eval-every)", 1, TOP),
    "keep": Bound(whole, "last checkpoints that stay, besides the best (default: 2)", 1, TOP),
    "patience": Bound(whole, "stop after so many evaluations without a better one", 1, TOP),
    "sample": Bound(whole, "tokens of the sample text at each evaluation (default: 100)", 0, TOP),
}
# What changes the course of a run, so that a resume must have the same.
COURSE = (
    "init_std", "ctx", "lora", "lora_alpha", "lora_targets", "batch", "micro_batch", "steps", "lr", "final_lr",
    "warmup", "weight_decay", "clip", "beta1", "beta2", "dtype", "remat", "seed", "pack", "val_fraction",
)  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a run. Those that are not given are None, or else a resume could not tell."""
    option = partial(command.add_argument, default=None)
    option("--config", choices=CONFIGS, metavar="NAME", help=f"a published shape: {', '.join(CONFIGS)}")
    option("--init-from", metavar="MODEL", help="train on from a model: a file, a folder, or a name on the hub")
    option("--tokenizer", metavar="PATH", help="a model or a folder with one, or chars or bpe (default: the model's)")
    for name, bound in NUMBERS.items():
        option(f"--{name.replace('_', '-')}", type=bound.kind, metavar="N" if bound.kind is whole else "X",
               help=bound.says)  # fmt: skip
    option("--tied", action=argparse.BooleanOptionalAction, help="one matrix embeds and unembeds (default: yes)")
    option("--lora-targets", metavar="A,B", help=f"matrices with adapters (default: {','.join(MATRICES)})")
    option("--dtype", choices=[*DTYPES], help="of the arithmetic; the parameters stay float32 (default: float32)")
    option("--remat", choices=[*KEEP], help="what a layer keeps for its derivative (default: dots)")
    option("--mesh", metavar="AXIS=N,…", help=HELP)
    kinds = "hf: folders as transformers reads; orbax: each process writes what its devices hold, as the run goes on"
    option("--checkpoints", choices=FORMATS, help=f"{kinds} (default: orbax on a mesh or with several processes)")
    option("--pack", action="store_true", help="several documents in a row, which do not see each other")


def settle(args: argparse.Namespace, before: Mapping[str, Any]) -> Settings:
    """The settings: as given; where nothing is, as before; or as they follow from others."""
    given = {name: value for name in Settings._fields if (value := getattr(args, name)) not in (None, [])}
    fields: dict[str, Any] = {**Settings()._asdict(), **before, **given}
    unknown = sorted(fields.keys() - {*Settings._fields})
    check("options", ", ".join(unknown), not unknown, f"those of version {__version__}", "run.json")
    fields["data"] = tuple(os.path.abspath(path) for path in fields["data"])
    s = Settings(**fields)
    for name, bound in NUMBERS.items():
        if (value := getattr(s, name)) is not None:
            bound.check(name, value)
    least = max(s.steps // 10, 1)
    s = s._replace(
        final_lr=s.lr / 10 if s.final_lr is None else s.final_lr,
        warmup=min(s.steps // 10, 100) if s.warmup is None else s.warmup,
        eval_every=s.eval_every or least,
        save_every=s.save_every or s.eval_every or least,
        checkpoints=s.checkpoints or ("orbax" if s.mesh or several() else "hf"),
        lora_alpha=s.lora_alpha or (2.0 * s.lora if s.lora else None),
    )
    check_settled(s, given)
    return s


def check_settled(s: Settings, given: Mapping[str, Any]) -> None:
    """Refuse what does not go together."""
    micro, warmup, final = s.micro_batch or s.batch, cast(int, s.warmup), cast(float, s.final_lr)
    check("micro_batch", micro, s.batch % micro == 0, f"a divisor of the batch, {s.batch}")
    check("warmup", warmup, warmup <= s.steps, f"at most the {s.steps} steps")
    check("final_lr", final, final <= s.lr, f"at most the learning rate, {s.lr}")
    unknown = [name for name in s.lora_targets.split(",") if name not in MATRICES]
    check("lora_targets", ", ".join(unknown), not unknown, f"some of {','.join(MATRICES)}")
    check("lora", s.lora, s.lora is None or s.init_from is not None, "a model to adapt: --init-from")
    check("config", s.config, s.config is None or s.init_from is None, "nothing, as --init-from has a model")
    if s.mesh:
        parse_mesh(s.mesh)
    for name in MODEL if s.init_from else ():
        check(name, given.get(name), name not in given, "nothing, as --init-from has a model")


def new_config(s: Settings, vocab: int) -> Config:
    """The config of a new model: a published one, or a small one, with other sizes where they are given."""
    base = CONFIGS[s.config] if s.config else Config(vocab, 128, 4, 4, 1, 32, 352, s.ctx or 256, 1e-5, 1e4, None, True)
    check("vocab", vocab, vocab <= base.vocab, f"at most {base.vocab}, as --config {s.config} has", "tokenizer")
    dim, heads = s.dim or base.dim, s.heads or base.kv_heads * base.q_per_kv
    kv_heads = s.kv_heads or (heads if s.heads else base.kv_heads)
    check("heads", heads, dim % heads == 0, f"a divisor of dim, {dim}")
    check("kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of the {heads} heads")
    head_dim = dim // heads
    check("heads", heads, head_dim % 2 == 0, f"heads of an even width; {dim} / {heads} is {head_dim}")
    sizes = {"dim": dim, "kv_heads": kv_heads, "q_per_kv": heads // kv_heads, "head_dim": head_dim}
    hidden = s.hidden_dim or (-(-8 * dim // 96) * 32 if s.dim else base.hidden_dim)
    others = {name: value for name in ("layers", "theta", "tied") if (value := getattr(s, name)) is not None}
    config = replace(base, **sizes, hidden_dim=hidden, **others)
    check_config(config)
    return config


def row_length(s: Settings, model: Config | None) -> int:
    """How many tokens a row has."""
    ctx = model.ctx if model else CONFIGS[s.config].ctx if s.config else s.ctx or 256
    length = s.ctx or min(ctx, 256)
    check("ctx", length, length <= ctx, f"at most the model's context, {ctx}")
    return length


def rows_at_once(s: Settings, config: Config) -> int:
    """The most rows, a divisor of the batch, whose logits are at most `LOGITS` numbers; all of them but on a CPU.

    On a mesh, every device has some of them."""
    fitting = LOGITS // (row_length(s, config) * config.vocab) if jax.default_backend() == "cpu" else s.batch
    sizes = parse_mesh(s.mesh) if s.mesh else {"data": 1, "fsdp": 1}
    least = sizes["data"] * sizes["fsdp"]
    return max(rows for rows in range(least, s.batch + 1, least) if s.batch % rows == 0 and rows <= max(fitting, least))


def mesh_of(s: Settings) -> Mesh | None:
    """The devices that are asked for, or those of all processes; none where one will do."""
    if not s.mesh and processes() == 1:
        return None
    sizes = parse_mesh(s.mesh or f"data={jax.device_count()}")
    for name in ("batch", "micro_batch"):
        check_rows(getattr(s, name) or s.batch, sizes, name)
    return make_mesh(sizes)


def recipe_of(s: Settings, config: Config) -> Recipe:
    """What of the settings is compiled into a step."""
    scale = cast(float, s.lora_alpha) / s.lora if s.lora else 1.0
    micro, betas = s.micro_batch or rows_at_once(s, config), (s.beta1, s.beta2)
    return Recipe(config, micro, s.clip, s.weight_decay, betas, s.dtype, s.remat, scale)


def versions() -> str:
    """Where a run computes the same bits again."""
    device = jax.devices()[0]
    where = f"{jax.device_count()} × {device.device_kind}" if device.platform != "cpu" else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"lovely-llama {__version__}, jax {jax.__version__}, numpy {np.__version__}, {where}, {cores} cores"


def fingerprints(s: Settings, config: Config, others: Mapping[str, str]) -> dict[str, Any]:
    """By name, what a resume must find as it was."""
    sizes = {f"config.{name}": value for name, value in asdict(config).items()}
    marks = {**sizes, **{name: getattr(s, name) for name in COURSE}, **others, "versions": versions()}
    return json.loads(json.dumps(marks))
