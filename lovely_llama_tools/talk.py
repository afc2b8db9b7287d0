"""The commands `chat` and `generate`: answers and texts on a terminal, through pipes, and interrupted."""

import argparse
import importlib
import json
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

from .batch_generate import BATCH, generate_all
from .chat import chat_prompt, recent
from .corpora import read_text
from .files import default_model, load
from .formats import DTYPES, Model
from .generate import Generation, Session, generate
from .interrupts import ending
from .options import add_command, add_mesh, chosen_mesh, ids, number, whole
from .tokens import check_text

SAYS = {
    "repetition_penalty": "divide the logits of tokens seen before by X",
    "temperature": "divide the logits by X; 0 always takes the most likely token",
    "top_k": "keep the N most likely tokens",
    "top_p": "keep the most likely tokens whose probabilities sum to X",
    "min_p": "keep tokens at least X times as likely as the most likely one",
}
HELP = "/bye or Ctrl-D ends the conversation, Ctrl-C an answer, /help shows this"


def add(commands: Any) -> None:
    """Add the commands and their options."""
    for name, what in (("chat", "answer PROMPT, or hold a conversation"), ("generate", "continue PROMPT, or many")):
        command = add_command(commands, name, what, talk)
        says = "a text; what is piped in comes after it; - stands for that alone"
        command.add_argument("prompt", metavar="PROMPT", nargs="?", help=says)
        option = partial(command.add_argument, default=None)
        option("--model", metavar="MODEL", help="a file, a folder, or a name on Hugging Face's hub (default: SmolLM2)")
        option("--dtype", choices=DTYPES, help="of the parameters (default: float32 on a CPU, else as stored)")
        option("--max-new", type=whole, metavar="N", help="at most N new tokens (default: up to the context's end)")
        for sampler, default in Sampling()._asdict().items():
            shown = "" if default is None else f" (default: the model's own, or {default})"
            flag, kind = f"--{sampler.replace('_', '-')}", whole if LIMITS[sampler][2] is None else number
            option(flag, type=kind, metavar="N" if kind is whole else "X", help=SAYS[sampler] + shown)
        option("--seed", type=whole, metavar="N", help="the same text every time (default: a new seed)")
        option("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given more than once")
        if name == "chat":
            option("--system", metavar="TEXT", help="the system message (default: the template's own)")
        else:
            says = (
                "continue every line of FILE (- for stdin), line i from 0 as by itself with --seed plus i; each text "
            )
            says += r"is printed as one line, with \n, \r and \\ for newlines and backslashes"
            option("--prompts", metavar="FILE", help=says)
            option("--batch", type=whole, metavar="N", help=f"of --prompts, N at once (default: {BATCH})")
            command.add_argument("--json", action="store_true", help="print an object of JSON for each of --prompts")
        add_mesh(command)
        command.add_argument("--quiet", action="store_true", help="no line of statistics on stderr")


def say(generation: Generation, quiet: bool = False) -> str:
    """Print text as it comes, then a line of statistics on stderr. Return the text."""
    text = ""
    for part in generation:
        shown = part if isinstance(part, str) else f"{part} "  # an id, where there is no tokenizer
        text += shown
        print(shown, end="", flush=True)
    print(flush=True)
    times, reason = generation.times, generation.reason
    # The prompt's time includes the first new token, and the second may wait for a compilation.
    read, cached = len(generation.prompt) - generation.cached, generation.cached
    prompt = read / (times[1] - times[0]) if len(times) > 1 else 0
    decode = (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else 0
    ends = {"stop": "ended", "length": "cut at --max-new", "context": "cut where the context ends"}
    counts = f"prompt {len(generation.prompt)} tokens{f' ({cached} cached)' if cached else ''}, {prompt:.1f}/s"
    if not quiet:
        end = ends.get(reason, reason)
        print(f"{counts}; new {len(generation.tokens)}, {decode:.1f}/s; {end}", file=sys.stderr)
    return text


def piped() -> str:
    """What is piped into stdin, or redirected from a file; nothing from a terminal, a device or a closed stdin."""
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
    """The lines of a file, or of stdin; an empty one is a prompt too."""
    lines = read_text(file).removesuffix("\n").split("\n")
    check("prompts", "nothing", lines != [""], "a line for each prompt", file)
    return [line.removesuffix("\r") for line in lines]


def say_all(model: Model, lines: list[str], args: argparse.Namespace, sampling: Sampling, seed: int) -> None:
    """Print what follows each line of a file, once it and those before are known; then a line of statistics."""
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
        print(json.dumps(record) if args.json else shown, flush=True)
    if not args.quiet:
        speed = count / (time.perf_counter() - began)
        print(f"{len(lines)} prompts; new {count}, {speed:.1f}/s with the reading of prompts", file=sys.stderr)


def talk(args: argparse.Namespace) -> None:
    """The commands `chat` and `generate`."""
    for field in ("prompt", "system"):
        check_text(field, getattr(args, field, None) or "")
    chosen = {name: getattr(args, name) for name in Sampling._fields if getattr(args, name) is not None}
    if args.command == "generate":
        given, alone = args.prompts is not None, args.batch is None and not args.json
        check("PROMPT", "none", given or args.prompt is not None, "a text, or --prompts FILE")
        check("PROMPT", "both a text and --prompts", not given or args.prompt is None, "one of them")
        check("prompts", "none", given or alone, "a FILE, with --batch and --json")
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    if args.prompt is not None:
        texts = ["" if args.prompt == "-" else args.prompt, piped()]
        args.prompt = "\n".join(filter(None, texts))
    lines = read_prompts(args.prompts) if args.command == "generate" and args.prompts is not None else None
    mesh, path = chosen_mesh(args.mesh), args.model or default_model()
    model = load(path, args.dtype, mesh)
    sampling = (model.sampling or Sampling())._replace(**chosen)
    more = partial(generate, model, max_new=args.max_new, sampling=sampling, seed=seed, stop=args.stop or ())
    if lines is not None:
        say_all(model, lines, args, sampling, seed)
    elif args.command == "generate":
        say(more(str(args.prompt) if model.tokenizer else ids(str(args.prompt), path)), args.quiet)
    else:
        converse(model, more, args)


def interrupts(generation: Generation, number: int) -> bool:
    """End an answer on Ctrl-C, unless it was to end already."""
    if number != signal.SIGINT or generation.interrupted:
        return False
    generation.interrupt()
    return True


def converse(model: Model, more: "partial[Generation]", args: argparse.Namespace) -> None:
    """Answer one prompt, or line after line. On a terminal, what cannot be answered does not end the conversation."""
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
    """The lines of stdin, up to /bye or its end. On a terminal each is prompted for, wherever stdout goes."""
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
