"""The commands `chat` and `generate`, on a terminal and in pipes."""

import argparse
import importlib
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from lovely_llama import LIMITS, LlamaError, Sampling, check

from ..data.reading import read_text
from ..extras import counted
from ..formats.files import default_model, load
from ..formats.model import DTYPES, Model
from ..inference.batch import BATCH, generate_all
from ..inference.chat import chat_prompt, recent
from ..inference.generate import Generation, Session, generate
from ..interrupts import ending
from ..strict_json import to_json
from ..tokens import check_text
from .options import MESH, MODEL, READ, READING, add_command, chosen_mesh, ids, number, reading, whole

SAYS = {
    "repetition_penalty": "divide the logits of tokens seen before by X",
    "temperature": "divide the logits by X; 0 always takes the most likely token",
    "top_k": "keep the N most likely tokens",
    "top_p": "keep the most likely tokens whose probabilities sum to X",
    "min_p": "keep tokens at least X times as likely as the most likely one",
}
HELP = "/bye or Ctrl-D ends the conversation, Ctrl-C an answer, /help shows this"
PROMPT = "the text; piped input is appended, and - stands for piped input alone"
MODELS = {
    "--model": dict(metavar="MODEL", help=f"{MODEL} (default: SmolLM2)"),
    **READ,
    "--dtype": dict(choices=[*DTYPES], help="precision of the parameters (default: float32 on a CPU, else as stored)"),
    "--mesh": dict(metavar="AXIS=N,…", help=MESH),
}
OUTPUT = {
    "--max-new": dict(type=whole, metavar="N", help="generate at most N tokens (default: until the context is full)"),
    "--stop": dict(action="append", metavar="TEXT", help="end before TEXT; may be repeated"),
    "--quiet": dict(action="store_true", help="print no statistics on stderr"),
}
SEED = dict(type=whole, metavar="N", help="random seed; the same seed gives the same text (default: a new one)")
MANY = {
    "--prompts": dict(metavar="FILE", help="continue every line of FILE, or of stdin for -, line i with seed + i; "
                      r"each result is one line, with \n, \r and \\ for newlines and backslashes"),
    "--batch": dict(type=whole, metavar="N", help=f"prompts generated at the same time (default: {BATCH})"),
    "--json": dict(action="store_true", help="print a JSON object for each prompt"),
}  # fmt: skip
CHATS = """
lovely-llama chat
lovely-llama chat "Why is the sky blue?" --max-new 200
cat notes.txt | lovely-llama chat "Summarise this text." --temperature 0
"""
TEXTS = """
lovely-llama generate "Once upon a time" --max-new 50 --seed 1
lovely-llama generate "To be, or" --model run/best --top-k 40
lovely-llama generate --prompts prompts.txt --json --max-new 20
"""


def add(commands: Any) -> None:
    """Add both commands."""
    prompt = dict(metavar="PROMPT", nargs="?", help=PROMPT)
    system = dict(metavar="TEXT", help="the system message (default: that of the model's template)")
    chats = {
        "conversation": {"prompt": prompt, "--system": system},
        "model": MODELS,
        "sampling": samplers(),
        "output": OUTPUT,
    }
    about = f"Answer PROMPT, or hold a conversation: {HELP}."
    what = "talk to a model"
    add_command(commands, "chat", what, talk, chats, about=about, examples=CHATS, extras=READING)
    texts = {
        "prompt": {"prompt": prompt, **MANY},
        "model": MODELS,
        "sampling": samplers(),
        "output": OUTPUT,
    }
    add_command(commands, "generate", "continue a text, or many", talk, texts, examples=TEXTS, extras=READING)


def samplers() -> dict[str, dict[str, Any]]:
    """An option for each sampler, and the seed."""
    options = dict[str, dict[str, Any]]()
    for name, default in Sampling()._asdict().items():
        shown = "" if default is None else f" (default: the model's own, or {default})"
        kind = whole if LIMITS[name][2] is None else number
        options[f"--{name.replace('_', '-')}"] = {
            "type": kind, "metavar": "N" if kind is whole else "X", "help": SAYS[name] + shown,
        }  # fmt: skip
    return options | {"--seed": SEED}


def say(generation: Generation, quiet: bool = False) -> str:
    """Print text as it is generated, then statistics on stderr; return the text."""
    text = ""
    for part in generation:
        shown = part if isinstance(part, str) else f"{part} "  # an id, where there is no tokenizer
        text += shown
        print(shown, end="", flush=True)
    print(flush=True)
    times, reason = generation.times, generation.reason
    # Reading the prompt includes the first new token; the second may include a compilation.
    read, cached = len(generation.prompt) - generation.cached, generation.cached
    prompt = read / (times[1] - times[0]) if len(times) > 1 else 0
    decode = (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else 0
    ends = {"stop": "ended", "length": "cut at --max-new", "context": "cut where the context ends"}
    read = counted(len(generation.prompt), "token")
    counts = f"prompt {read}{f' ({cached} cached)' if cached else ''}, {prompt:.1f}/s"
    if not quiet:
        end = ends.get(reason, reason)
        print(f"{counts}; new {len(generation.tokens)}, {decode:.1f}/s; {end}", file=sys.stderr)
    return text


def piped() -> str:
    """The text of stdin if it is a pipe or a file; nothing from a terminal, a device, or a closed stdin."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return ""
    try:
        text = sys.stdin.read() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""
    except UnicodeDecodeError as error:
        raise LlamaError("stdin", "text", "bytes that are not UTF-8", "text") from error
    return text.removesuffix("\n")


def read_prompts(file: str) -> list[str]:
    """The prompts in a file or stdin, one per line; an empty line is an empty prompt."""
    lines = read_text(file).removesuffix("\n").split("\n")
    check("prompts", "nothing", lines != [""], "a line for each prompt", file)
    return [line.removesuffix("\r") for line in lines]


def say_all(model: Model, lines: list[str], args: argparse.Namespace, sampling: Sampling, seed: int) -> None:
    """Print the continuation of each line, in order, then statistics on stderr."""
    batch, began, count = BATCH if args.batch is None else args.batch, time.perf_counter(), 0
    prompts = lines if model.tokenizer else [ids(line, args.model) for line in lines]
    try:
        found = generate_all(model, prompts, args.max_new, sampling, seed, args.stop or (), batch)
    except LlamaError as error:
        if not (number := re.fullmatch(r"prompts\[(\d+)\]", error.file)):
            raise
        raise LlamaError(args.prompts, f"line {int(number[1]) + 1}", error.got, error.expected) from error
    for line, (text, tokens, reason) in zip(lines, found, strict=True):
        count += len(tokens)
        text = text if model.tokenizer else " ".join(map(str, tokens))
        shown = text.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
        record = {"prompt": line, "text": text, "reason": reason}
        print(to_json(record) if args.json else shown, flush=True)
    if not args.quiet:
        speed = count / (time.perf_counter() - began)
        read = counted(len(lines), "prompt")
        print(f"{read}; new {count}, {speed:.1f}/s with the reading of prompts", file=sys.stderr)


def talk(args: argparse.Namespace) -> None:
    """Run `chat` or `generate`."""
    for field in ("prompt", "system"):
        check_text(field, getattr(args, field, None) or "")
    chosen = {name: getattr(args, name) for name in Sampling._fields if getattr(args, name) is not None}
    if args.command == "generate":
        given, alone = args.prompts is not None, args.batch is None and not args.json
        check("PROMPT", "both a text and --prompts", not given or args.prompt is None, "one of them")
        check("prompts", "none", given or alone, "a FILE, with --batch and --json")
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    if args.prompt is not None or (args.command == "generate" and args.prompts is None):
        texts = ["" if args.prompt in (None, "-") else args.prompt, piped()]
        check("PROMPT", "none", args.prompt is not None or bool(texts[1]), "a text, piped input, or --prompts FILE")
        args.prompt = "\n".join(filter(None, texts))
    lines = read_prompts(args.prompts) if args.command == "generate" and args.prompts is not None else None
    mesh, path = chosen_mesh(args.mesh), args.model or default_model()
    model = load(path, args.dtype, mesh, **reading(args))
    sampling = (model.sampling or Sampling())._replace(**chosen)
    more = partial(generate, model, max_new=args.max_new, sampling=sampling, seed=seed, stop=args.stop or ())
    if lines is not None:
        say_all(model, lines, args, sampling, seed)
    elif args.command == "generate":
        say(more(str(args.prompt) if model.tokenizer else ids(str(args.prompt), path)), args.quiet)
    else:
        converse(model, more, args)


def interrupts(generation: Generation, number: int) -> bool:
    """Take a first Ctrl-C as the end of the answer; a second one is not taken."""
    if number != signal.SIGINT or generation.interrupted:
        return False
    generation.interrupt()
    return True


def converse(model: Model, more: "partial[Generation]", args: argparse.Namespace) -> None:
    """Answer one prompt, or each line of stdin. On a terminal the conversation continues after an error."""
    session, limit = Session(model), model.config.ctx - min(args.max_new or model.config.ctx, model.config.ctx // 4)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    alive, whole = args.prompt is None and sys.stdin is not None and sys.stdin.isatty(), True  # pyright: ignore
    for line in lines() if args.prompt is None else [args.prompt]:
        messages.append({"role": "user", "content": line})
        try:
            fitting = recent(model.tokenizer, messages, limit)
            if len(fitting) < len(messages) and whole:
                print("note: the oldest turns no longer fit into the context, and are dropped", file=sys.stderr)
                whole = False
            generation = more(chat_prompt(model.tokenizer, fitting), session=session)
            with ending(partial(interrupts, generation)) if alive else nullcontext():
                answer = say(generation, args.quiet)
        except LlamaError as error:
            if not alive:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
        else:
            messages = [*fitting, {"role": "assistant", "content": answer}]


def lines() -> Iterator[str]:
    """The lines of stdin up to /bye or its end. On a terminal each gets a prompt, even if stdout is redirected."""
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] -- it is None where it was closed
        return
    asked, shown = sys.stdin.isatty(), sys.stdout.isatty()
    if asked:
        importlib.import_module("readline")  # its import makes input() edit lines
    while True:
        if asked and not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> " if asked and shown else "")
        except EOFError:
            if asked:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise LlamaError("stdin", "line", "bytes that are not UTF-8", "text") from error
        if line.strip() == "/bye":
            return
        if line.strip() == "/help":
            print(HELP, file=sys.stderr)
        elif line.strip():
            yield line
