"""The settings of a training run: defaults, limits, values derived from others, and the config of a new model."""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh

from lovely_llama import CONFIGS, Config, __version__, check, check_config

from ..devices.cluster import processes, several
from ..devices.mesh import check_rows, make_mesh, parse_mesh
from ..extras import counted
from ..strict_json import to_json
from .step import MATRICES, StepOptions

LEARNED = ("chars", "bpe")  # tokenizers
# Settings of a new model, which --init-from excludes.
MODEL = ("layers", "heads", "kv_heads", "dim", "hidden_dim", "theta", "tied", "init_std")


class Settings(NamedTuple):
    """All options of `train`, by name. None: derived by `settle`, or off."""

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
    special_tokens: bool = False
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
    """The range of a numeric setting."""

    least: float
    most: float = math.inf
    whole: bool = False
    strict: bool = False  # excludes the lower end
    below: bool = False  # excludes the upper end

    def check(self, name: str, value: Any) -> None:
        """Refuse a value out of range."""
        inside = math.isfinite(value) and self.least <= value <= self.most
        inside = inside and not (self.strict and value == self.least) and not (self.below and value == self.most)
        upper = "" if self.most == math.inf else f" {'below' if self.below else 'to'} {self.most}"
        what = "a whole number" if self.whole else "a number"
        check(name, value, inside, f"{what} {'above' if self.strict else 'from'} {self.least}{upper}")


TOP = 2**31 - 1
LOGITS = 2**23  # 256 tokens × 32,000: on a CPU, 8 such sequences take 1.2 times as long together as one by one
WHOLE = Bound(1, TOP, whole=True)
NUMBERS = {
    "vocab": WHOLE,
    "layers": WHOLE,
    "heads": WHOLE,
    "kv_heads": WHOLE,
    "dim": WHOLE,
    "hidden_dim": WHOLE,
    "theta": Bound(1, strict=True),
    "init_std": Bound(0, strict=True),
    "ctx": WHOLE,
    "lora": WHOLE,
    "lora_alpha": Bound(0, strict=True),
    "batch": WHOLE,
    "micro_batch": WHOLE,
    "steps": WHOLE,
    "lr": Bound(0, strict=True),
    "final_lr": Bound(0),
    "warmup": Bound(0, TOP, whole=True),
    "weight_decay": Bound(0),
    "clip": Bound(0, strict=True),
    "beta1": Bound(0, 1, below=True),
    "beta2": Bound(0, 1, below=True),
    "seed": Bound(0, 2**32 - 1, whole=True),
    "val_fraction": Bound(0, 1, below=True),
    "eval_every": WHOLE,
    "eval_batches": WHOLE,
    "save_every": WHOLE,
    "keep": WHOLE,
    "patience": WHOLE,
    "sample": Bound(0, TOP, whole=True),
}
# Settings that affect the numbers, which a resume must therefore repeat.
REPRODUCED = (
    "init_std", "ctx", "lora", "lora_alpha", "lora_targets", "batch", "micro_batch", "steps", "lr", "final_lr",
    "warmup", "weight_decay", "clip", "beta1", "beta2", "dtype", "remat", "seed", "pack", "val_fraction",
)  # fmt: skip


def settle(given: Mapping[str, Any], before: Mapping[str, Any]) -> Settings:
    """All settings: those given, else those of the run that is resumed, else the defaults."""
    fields: dict[str, Any] = {**Settings()._asdict(), **before, **given}
    unknown = sorted(fields.keys() - {*Settings._fields})
    check("options", ", ".join(unknown), not unknown, f"those of version {__version__}", "run.json")
    fields["data"] = tuple(os.path.abspath(path) for path in fields["data"])
    for name in ("init_from", "tokenizer"):
        if (value := fields[name]) and value not in LEARNED and os.path.exists(value):  # else on the hub, or nowhere
            fields[name] = os.path.abspath(value)
    s = Settings(**fields)
    for name, bound in NUMBERS.items():
        if (value := getattr(s, name)) is not None:
            bound.check(name, value)
    tenth = max(s.steps // 10, 1)
    s = s._replace(
        final_lr=s.lr / 10 if s.final_lr is None else s.final_lr,
        warmup=min(s.steps // 10, 100) if s.warmup is None else s.warmup,
        eval_every=s.eval_every or tenth,
        save_every=s.save_every or s.eval_every or tenth,
        checkpoints=s.checkpoints or ("orbax" if s.mesh or several() else "hf"),
        lora_alpha=s.lora_alpha or (2.0 * s.lora if s.lora else None),
    )
    check_settled(s, given)
    return s


def check_settled(s: Settings, given: Mapping[str, Any]) -> None:
    """Refuse settings that contradict each other."""
    micro, warmup, final = s.micro_batch or s.batch, cast(int, s.warmup), cast(float, s.final_lr)
    check("micro_batch", micro, s.batch % micro == 0, f"a divisor of the batch, {s.batch}")
    check("warmup", warmup, warmup <= s.steps, f"at most the {counted(s.steps, 'step')}")
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
    """The config of a new model: --config or a small default, with the given sizes changed."""
    base = CONFIGS[s.config] if s.config else Config(vocab, 128, 4, 4, 1, 32, 352, s.ctx or 256, 1e-5, 1e4, None, True)
    check("vocab", vocab, vocab <= base.vocab, f"at most {base.vocab}, as --config {s.config} has", "tokenizer")
    dim, heads = s.dim or base.dim, s.heads or base.kv_heads * base.q_per_kv
    kv_heads = s.kv_heads or (heads if s.heads else base.kv_heads)
    check("heads", heads, dim % heads == 0, f"a divisor of dim, {dim}")
    check("kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of the {counted(heads, 'head')}")
    head_dim = dim // heads
    check("heads", heads, head_dim % 2 == 0, f"heads of an even width; {dim} / {heads} is {head_dim}")
    sizes = {"dim": dim, "kv_heads": kv_heads, "q_per_kv": heads // kv_heads, "head_dim": head_dim}
    hidden = s.hidden_dim or (-(-8 * dim // 96) * 32 if s.dim else base.hidden_dim)
    others = {name: value for name in ("layers", "theta", "tied") if (value := getattr(s, name)) is not None}
    config = replace(base, **sizes, hidden_dim=hidden, **others)
    check_config(config)
    return config


def row_length(s: Settings, model: Config | None) -> int:
    """Tokens per sequence."""
    ctx = model.ctx if model else CONFIGS[s.config].ctx if s.config else s.ctx or 256
    length = s.ctx or min(ctx, 256)
    check("ctx", length, length <= ctx, f"at most the model's context, {ctx}")
    return length


def default_micro_batch(s: Settings, config: Config) -> int:
    """On a CPU the largest divisor of the batch whose logits have at most `LOGITS` elements; elsewhere the batch.

    On a mesh it is at least one sequence per device."""
    fitting = LOGITS // (row_length(s, config) * config.vocab) if jax.default_backend() == "cpu" else s.batch
    sizes = parse_mesh(s.mesh) if s.mesh else {"data": 1, "fsdp": 1}
    least = sizes["data"] * sizes["fsdp"]
    return max(rows for rows in range(least, s.batch + 1, least) if s.batch % rows == 0 and rows <= max(fitting, least))


def mesh_of(s: Settings) -> Mesh | None:
    """The mesh of --mesh, else of all devices of several processes; None for a single device."""
    if not s.mesh and processes() == 1:
        return None
    sizes = parse_mesh(s.mesh or f"data={jax.device_count()}")
    for name in ("batch", "micro_batch"):
        check_rows(getattr(s, name) or s.batch, sizes, name)
    return make_mesh(sizes)


def step_options(s: Settings, config: Config) -> StepOptions:
    """The settings that are compiled into a step."""
    scale = cast(float, s.lora_alpha) / s.lora if s.lora else 1.0
    micro, betas = s.micro_batch or default_micro_batch(s, config), (s.beta1, s.beta2)
    return StepOptions(config, micro, s.clip, s.weight_decay, betas, s.dtype, s.remat, scale)


def versions() -> str:
    """Versions and hardware, on which a run is reproducible bit for bit."""
    device = jax.devices()[0]
    where = f"{jax.device_count()} × {device.device_kind}" if device.platform != "cpu" else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"{where}, {counted(cores or 1, 'core')}"
    return f"lovely-llama {__version__}, jax {jax.__version__}, numpy {np.__version__}, {where}"


def fingerprints_of(s: Settings, config: Config, others: Mapping[str, str]) -> dict[str, Any]:
    """Everything that must be the same on resume, by name."""
    sizes = {f"config.{name}": value for name, value in asdict(config).items()}
    fingerprints = {**sizes, **{name: getattr(s, name) for name in REPRODUCED}, **others, "versions": versions()}
    return json.loads(to_json(fingerprints))
