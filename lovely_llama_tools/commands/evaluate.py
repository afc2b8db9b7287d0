"""The command `evaluate`: perplexity of a model on texts, and its results on tasks of lm-eval."""

import argparse
import time
from typing import Any

from lovely_llama import LlamaError, check

from ..data.corpora import read_text
from ..formats.files import load
from ..inference.harness import run_tasks
from ..inference.scoring import Score, perplexity
from ..strict_json import nulled, to_json
from .options import MESH, MODEL, READING, add_command, chosen_mesh, ids, whole

OPTIONS = {
    "model": {
        "model": dict(metavar="MODEL", help=MODEL),
        "--mesh": dict(metavar="AXIS=N,…", help=MESH),
    },
    "perplexity": {
        "texts": dict(metavar="TEXT", nargs="*", help="text files in UTF-8; - stands for stdin"),
        "--ctx": dict(
            type=whole, metavar="N", help="window size in tokens (default: the model's context, at most 2048)"
        ),
        "--stride": dict(type=whole, metavar="N", help="tokens scored per window (default: half of it)"),
    },
    "lm-eval": {
        "--tasks": dict(metavar="NAME,…", help="run these tasks of lm-eval instead"),
        "--include-path": dict(metavar="DIR", help="folder of your own tasks"),
        "--limit": dict(type=whole, metavar="N", help="use the first N examples of each task only"),
    },
    "output": {"--json": dict(action="store_true", help="print JSON")},
}
ABOUT = """Measure the perplexity of MODEL on texts, each scored by itself in overlapping windows, or its results on
tasks of lm-eval."""
EXAMPLES = """
lovely-llama evaluate run/best notes.txt
lovely-llama evaluate run/best book.txt notes.txt --ctx 64 --json
cat notes.txt | lovely-llama evaluate run/best -
"""
EXTRAS = {"eval": "--tasks", **READING}


def add(commands: Any) -> None:
    """Add the command."""
    what = "measure perplexity, or run lm-eval's tasks"
    add_command(commands, "evaluate", what, evaluate, OPTIONS, about=ABOUT, examples=EXAMPLES, extras=EXTRAS)


def evaluate(args: argparse.Namespace) -> None:
    """Print the results, one a line."""
    check("TEXT", "both texts and --tasks", not (args.texts and args.tasks), "one of them")
    check("TEXT", "none", bool(args.texts or args.tasks), "a file, - for stdin, or --tasks")
    report = on_tasks(args) if args.tasks else on_texts(args)
    if args.json:
        print(to_json(nulled(report), ensure_ascii=False, indent=2))
        return
    width = max(20, *(len(name) + 2 for name in report))
    for name, value in report.items():
        shown = f"{value:.6g}" if isinstance(value, float) else "unknown" if value is None else value
        shown = f"{shown:,}" if isinstance(shown, int) else shown  # lm-eval has N/A among its numbers
        print(f"{name.replace('_', ' '):<{width}}{shown}")


def on_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of tasks, by task and name."""
    check("limit", args.limit, args.limit is None or args.limit > 0, "a whole number from 1")
    results = run_tasks(
        load(args.model, mesh=chosen_mesh(args.mesh)), args.tasks.split(","), args.include_path, args.limit
    )
    return {f"{task} {name}": value for task, found in results.items() for name, value in found.items()}


def on_texts(args: argparse.Namespace) -> dict[str, Any]:
    """The score over all texts."""
    texts = [(path, read_text(path)) for path in args.texts]
    for path, text in texts:
        check("text", "nothing", bool(text.strip()), "a text", path)
    model, start = load(args.model, mesh=chosen_mesh(args.mesh)), time.perf_counter()
    found = list[Score]()
    for path, text in texts:
        try:
            found.append(perplexity(model, text if model.tokenizer else ids(text, args.model), args.ctx, args.stride))
        except LlamaError as error:
            file = path if error.file in ("text", "arguments") and error.field in ("text", "tokens") else error.file
            raise LlamaError(file, error.field, error.got, error.expected) from error
    sizes = [score.bytes for score in found if score.bytes is not None]
    total = Score(sum(s.nats for s in found), sum(s.tokens for s in found), sum(sizes) if sizes else None)
    return {
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "nats_per_token": total.nats_per_token,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "tokens_per_s": total.tokens / (time.perf_counter() - start),
    }
