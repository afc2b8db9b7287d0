"""Record llama2.c's results: `python llama2_c/record.py CHECKOUT OUT` writes the files next to this one.

CHECKOUT is a clone of github.com/karpathy/llama2.c. Each function is recorded with random inputs, its outputs, a
cotangent for each output, and the gradient of Σ output · cotangent with respect to every input and weight.
"""

import contextlib
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.func import functional_call

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]

# Within a config, axes that could be mistaken for each other differ in size. gqa has the longest context.
CONFIGS: dict[str, dict[str, Any]] = {
    "mha": dict(dim=24, n_layers=3, n_heads=4, n_kv_heads=4, vocab_size=37, hidden_dim=34, max_seq_len=19),
    "gqa": dict(dim=36, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=41, hidden_dim=28, max_seq_len=80),
    "mqa": dict(dim=20, n_layers=2, n_heads=5, n_kv_heads=1, vocab_size=29, hidden_dim=26, max_seq_len=23),
    "deep": dict(dim=16, n_layers=12, n_heads=2, n_kv_heads=1, vocab_size=31, hidden_dim=22, max_seq_len=11),
}
EPS = {"mha": 1e-5, "gqa": 1e-4, "mqa": 1e-6, "deep": 1e-5}
EXPORTED: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=80, hidden_dim=128, max_seq_len=32, norm_eps=1e-5
)
STEPS = 20
TRAIN: dict[str, Any] = dict(
    learning_rate=5e-3, warmup_iters=4, lr_decay_iters=STEPS, min_lr=0.0, weight_decay=0.1, betas=(0.9, 0.95),
    eps=1e-8, grad_clip=1.0, accumulation=2,
)  # fmt: skip


def load_upstream(checkout: Path) -> tuple[Any, Any]:
    """The checkout's model.py and export.py, which imports the former as `model`."""
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("model"), importlib.import_module("export")
    finally:
        sys.path.pop(0)


def make_model(upstream: Any, args: Mapping[str, Any], tied: bool) -> Any:
    """A Transformer with all parameters random, gains included, and with its own unembedding if untied."""
    model = upstream.Transformer(upstream.ModelArgs(**args))
    if not tied:
        model.output.weight = torch.nn.Parameter(torch.empty_like(model.output.weight))
    for weight in model.parameters():
        drawn = torch.randn_like(weight)
        weight.data = 1 + drawn / 2 if weight.ndim == 1 else drawn / math.sqrt(weight.shape[1])
    return model


def record_function(name: str, function: Callable[[Tensors], Any], inputs: Tensors) -> Tensors:
    """One function's inputs, outputs, cotangents and gradients."""
    inputs = {arg: value.detach().requires_grad_() for arg, value in inputs.items()}
    outs = function(inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [torch.randn_like(out) for out in outs]
    grads = torch.autograd.grad(outs, list(inputs.values()), cotangents)
    return {
        **{f"{name}.in.{arg}": value for arg, value in inputs.items()},
        **{f"{name}.out{i}": out for i, out in enumerate(outs)},
        **{f"{name}.cotangent{i}": cotangent for i, cotangent in enumerate(cotangents)},
        **{f"{name}.grad.{arg}": grad for arg, grad in zip(inputs, grads, strict=True)},
    }


def record_functions(upstream: Any, model: Any, batch: int, seq: int) -> Tensors:
    """Every function at layer 0, and the block at layer 1."""
    args, (first, second) = model.params, model.layers[:2]
    angles = model.freqs_cos[:seq], model.freqs_sin[:seq]

    def module(name: str, module: torch.nn.Module, *rest: torch.Tensor, scale: float = 1) -> Tensors:
        def call(inputs: Tensors) -> torch.Tensor:
            weights = {arg: value for arg, value in inputs.items() if arg != "x"}
            return functional_call(module, weights, (inputs["x"], *rest))

        x = scale * torch.randn(batch, seq, args.dim)
        return record_function(name, call, {"x": x, **dict(module.named_parameters())})

    def heads(n: int) -> torch.Tensor:
        return torch.randn(batch, seq, n, args.dim // args.n_heads)

    def rope(inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return upstream.apply_rotary_emb(inputs["q"], inputs["k"], *angles)

    return {
        **module("rms_norm", first.attention_norm),
        **module("rms_norm_small", first.attention_norm, scale=1e-3),
        **record_function("rope", rope, {"q": heads(args.n_heads), "k": heads(args.n_kv_heads)}),
        **module("attention", first.attention, *angles),
        **module("feed_forward", first.feed_forward),
        **module("block", second, *angles),
    }


def record_model(model: Any, batch: int, seq: int) -> Tensors:
    """The whole model: logits, loss, the gradient of every parameter, and a greedy continuation past the context."""
    args = model.params
    tokens, targets = torch.randint(args.vocab_size, (2, batch, seq))
    targets[0, :3] = -1
    logits = model(tokens, targets)
    model.last_loss.backward()
    grads = {f"grad.{name}": weight.grad.clone() for name, weight in model.named_parameters()}
    prompt = torch.randint(args.vocab_size, (batch, 4))
    return {
        "tokens": tokens, "targets": targets, "logits": logits, "loss": model.last_loss.reshape(1),
        "greedy": model.generate(prompt, args.max_seq_len + 9, temperature=0.0), **grads,
    }  # fmt: skip


def learning_rate(step: int) -> float:
    """llama2.c's `get_lr`: linear warmup from 0, then cosine decay to min_lr."""
    warmup, decay, most, least = (TRAIN[k] for k in ("warmup_iters", "lr_decay_iters", "learning_rate", "min_lr"))
    if step < warmup:
        return most * step / warmup
    return least + (most - least) * (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) / 2


def record_training(model: Any, rows: int, seq: int) -> Arrays:
    """The training loop of llama2.c's train.py on random tokens. Modifies the model.

    The files were recorded with the gradient of `record_model` still in place, so the first step's includes it.
    """
    tokens = torch.randint(model.params.vocab_size, (STEPS, TRAIN["accumulation"], rows, seq + 1))
    optimizer = model.configure_optimizers(TRAIN["weight_decay"], TRAIN["learning_rate"], TRAIN["betas"], "cpu")
    losses, norms = list[float](), list[float]()
    for step, micro_batches in enumerate(tokens):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = 0.0
        for batch in micro_batches:
            model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            (model.last_loss / len(micro_batches)).backward()
            loss += model.last_loss.item() / len(micro_batches)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN["grad_clip"]).item())
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "train.tokens": tokens.numpy().astype(np.int32), "train.loss": np.array(losses),
        "train.lr": np.array([learning_rate(step) for step in range(STEPS)]), "train.grad_norm": np.array(norms),
        **{f"train.param.{name}": weight.detach().numpy() for name, weight in model.named_parameters()},
    }  # fmt: skip


def as_arrays(tensors: Tensors) -> Arrays:
    """float32 unchanged, ids as int32; copied, since training changes the parameters in place."""
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
    return {name: a.astype(np.int32) if a.dtype == np.int64 else a for name, a in arrays.items()}


def record(upstream: Any, args: Mapping[str, Any], tied: bool, seed: int) -> tuple[Arrays, dict[str, str]]:
    """All arrays of one config, and the metadata that describes them."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model, seq = make_model(upstream, args, tied), args["max_seq_len"] - 3
    tensors = {f"param.{name}": weight for name, weight in model.named_parameters()}
    tensors |= {"freqs_cos": model.freqs_cos, "freqs_sin": model.freqs_sin}
    tensors |= record_functions(upstream, model, 2, seq) | record_model(model, 2, seq)
    metadata = {"config": json.dumps({**args, "tied": tied}), "train": json.dumps(TRAIN), "torch": torch.__version__}
    return as_arrays(tensors) | record_training(model, 3, seq), metadata


def record_exports(upstream: Any, export: Any, tied: bool, seed: int, stem: Path, source: str) -> None:
    """One model in the three versions of llama2.c's own format, and its logits."""
    torch.manual_seed(seed)
    model = make_model(upstream, EXPORTED, tied)
    tokens = torch.randint(EXPORTED["vocab_size"], (1, EXPORTED["max_seq_len"]))
    answer = as_arrays({"tokens": tokens, "logits": model(tokens, tokens)})
    save_file(answer, f"{stem}.bin.safetensors", {"source": source})
    for version in (1, 2, 0):  # 0 comes last: its exporter negates an untied model's vocab_size
        export.model_export(model, f"{stem}.v{version}.bin", version)


def main(checkout: Path, out: Path) -> None:
    upstream, export = load_upstream(checkout)
    git = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    source = f"karpathy/llama2.c {subprocess.check_output(git, text=True).strip()}"
    out.mkdir(parents=True, exist_ok=True)
    for seed, tied in enumerate((True, False)):
        suffix = "tied" if tied else "untied"
        for i, (name, args) in enumerate(CONFIGS.items()):
            arrays, metadata = record(upstream, {**args, "norm_eps": EPS[name]}, tied, 2 * i + seed)
            save_file(arrays, out / f"{name}_{suffix}.safetensors", {**metadata, "source": f"{source} model.py"})
        record_exports(upstream, export, tied, seed, out / suffix, f"{source} export.py")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python llama2_c/record.py CHECKOUT OUT")
    with contextlib.redirect_stdout(sys.stderr):  # upstream prints as it goes
        main(Path(sys.argv[1]), Path(sys.argv[2]))
