"""The command `evaluate`: perplexity of a model on texts, and its results on tasks of lm-eval."""

import argparse
import time
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, check

from ..data.answers import score_records
from ..data.reading import read_text
from ..data.records import is_records
from ..formats.files import load
from ..inference.harness import metrics, run_tasks, tables
from ..inference.scoring import Score, perplexity
from ..strict_json import nulled, to_json
from .options import MESH, MODEL, READ, READING, add_command, chosen_mesh, ids, number, reading, whole

OPTIONS = {
    "model": {
        "model": dict(metavar="MODEL", help=MODEL),
        **READ,
        "--mesh": dict(metavar="AXIS=N,…", help=MESH),
    },
    "perplexity": {
        "texts": dict(
            metavar="TEXT", nargs="*", help="text files in UTF-8, or conversations in JSON; - stands for stdin"
        ),
        "--ctx": dict(
            type=whole, metavar="N", help="window size in tokens (default: the model's context, at most 2048)"
        ),
        "--stride": dict(type=whole, metavar="N", help="tokens scored per window (default: half of it)"),
    },
    "lm-eval": {
        "--tasks": dict(metavar="NAME,…", help="run these tasks of lm-eval instead"),
        "--include-path": dict(metavar="DIR", help="folder of your own tasks"),
        "--limit": dict(
            type=number, metavar="N", help="use the first N examples of each task only; below 1, this part of them"
        ),
        "--num-fewshot": dict(type=whole, metavar="N", help="examples before each question (default: the task's)"),
        "--apply-chat-template": dict(
            action="store_true", help="put questions as a conversation, by the model's template"
        ),
        "--batch-size": dict(type=whole, default=1, metavar="N", help="requests computed at a time (default: 1)"),
    },
    "output": {"--json": dict(action="store_true", help="print JSON")},
}
ABOUT = """Measure the perplexity of MODEL on texts, each scored by itself in overlapping windows; on the answers of
conversations, as `train` reads them; or its results on tasks of lm-eval."""
EXAMPLES = """
lovely-llama evaluate run/best book.txt notes.txt --ctx 64
cat notes.txt | lovely-llama evaluate run/best - --json
lovely-llama evaluate run/best --tasks own --include-path tasks --num-fewshot 2
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
    found = on_tasks(args) if args.tasks else None
    report = on_texts(args) if found is None else metrics(found)
    if args.json:
        print(to_json(nulled(report), ensure_ascii=False, indent=2))
        return
    if found is not None:
        print(tables(found))
        return
    for name, value in report.items():
        shown = f"{value:.6g}" if isinstance(value, float) else "unknown" if value is None else value
        shown = f"{shown:,}" if isinstance(shown, int) else shown
        print(f"{name.replace('_', ' '):<20}{shown}")


def on_tasks(args: argparse.Namespace) -> Any:
    """What lm-eval finds."""
    limit, shots, size = args.limit, args.num_fewshot, args.batch_size
    good = limit is None or 0 < limit < 1 or (limit >= 1 and limit == int(limit))
    check("limit", limit, good, "a whole number from 1, or a part below 1", "arguments")
    check("num_fewshot", shots, shots is None or shots >= 0, "a whole number from 0", "arguments")
    check("batch_size", size, size > 0, "a whole number from 1", "arguments")
    model, tasks = load(args.model, mesh=chosen_mesh(args.mesh), **reading(args)), args.tasks.split(",")
    how = {"limit": limit, "num_fewshot": shots, "apply_chat_template": args.apply_chat_template}
    return run_tasks(model, tasks, args.include_path, size, **how)


def on_texts(args: argparse.Namespace) -> dict[str, Any]:
    """The score over all texts."""
    rows = {path: path != "-" and is_records(Path(path)) for path in args.texts}
    texts = [(path, "" if rows[path] else read_text(path)) for path in args.texts]
    for path, text in texts:
        check("text", "nothing", rows[path] or bool(text.strip()), "a text", path)
    model, start = load(args.model, mesh=chosen_mesh(args.mesh), **reading(args)), time.perf_counter()
    found = list[Score]()
    for path, text in texts:
        try:
            if rows[path]:
                found += score_records(model, Path(path), args.ctx, args.stride)
                continue
            found.append(perplexity(model, text if model.tokenizer else ids(text, args.model), args.ctx, args.stride))
        except LlamaError as error:
            file = path if error.file in ("text", "arguments") and error.field in ("text", "tokens") else error.file
            raise LlamaError(file, error.field, error.got, error.expected) from error
    check("rows", "none that can be scored", bool(found), "an answer in one of them", ", ".join(args.texts))
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
