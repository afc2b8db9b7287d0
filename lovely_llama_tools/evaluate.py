"""The command `evaluate`: the perplexity of a model on texts, and its results in tasks of lm-eval."""

import argparse
import json
import time
from typing import Any

from lovely_llama import LlamaError, check

from .corpora import read_text
from .files import load
from .harness import run_tasks
from .options import add_command, add_mesh, chosen_mesh, ids, whole
from .scoring import Score, perplexity


def add(commands: Any) -> None:
    """Add the command and its options."""
    what = "the perplexity of MODEL on texts, each by itself, or its results in tasks of lm-eval"
    command = add_command(commands, "evaluate", what, evaluate)
    command.add_argument("model", metavar="MODEL", help="a file, a folder, or a name on Hugging Face's hub")
    command.add_argument("texts", metavar="TEXT", nargs="*", help="files in UTF-8; - stands for stdin")
    says = "tokens of the window (default: the model's context, at most 2048)"
    command.add_argument("--ctx", type=whole, metavar="N", help=says)
    says = "tokens by which the window advances, and that it scores (default: half of the window)"
    command.add_argument("--stride", type=whole, metavar="N", help=says)
    command.add_argument("--tasks", metavar="NAME,…", help="tasks of lm-eval, in place of texts")
    command.add_argument("--include-path", metavar="DIR", help="where tasks of your own are")
    command.add_argument("--limit", type=whole, metavar="N", help="the first N examples of each task alone")
    add_mesh(command)
    command.add_argument("--json", action="store_true", help="print JSON")


def evaluate(args: argparse.Namespace) -> None:
    """Print the results, one a line."""
    check("TEXT", "both texts and --tasks", not (args.texts and args.tasks), "one of them")
    check("TEXT", "none", bool(args.texts or args.tasks), "a file, - for stdin, or --tasks")
    report = on_tasks(args) if args.tasks else on_texts(args)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    for name, value in report.items():
        shown = f"{value:.6g}" if isinstance(value, float) else "unknown" if value is None else f"{value:,}"
        print(f"{name.replace('_', ' '):<20}{shown}")


def on_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of tasks, by task and name."""
    check("limit", args.limit, args.limit is None or args.limit > 0, "a whole number from 1")
    results = run_tasks(
        load(args.model, mesh=chosen_mesh(args.mesh)), args.tasks.split(","), args.include_path, args.limit
    )
    return {f"{task} {name}": value for task, found in results.items() for name, value in found.items()}


def on_texts(args: argparse.Namespace) -> dict[str, Any]:
    """The score of all texts together."""
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
