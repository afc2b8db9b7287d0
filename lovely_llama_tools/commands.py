"""The command line: what can be asked, and what each command prints."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, Sampling

from .chat import chat_prompt
from .files import default_model, load
from .generate import Generation, Session, generate
from .tokens import check_text


class Arguments(argparse.ArgumentParser):
    """A parser that raises LlamaError in place of printing its usage."""

    def error(self, message: str) -> Any:
        raise LlamaError("arguments", self.prog, message, "what --help says")


def number(text: str) -> float:
    """A decimal number. float() would accept nan, inf and 1_0 as well."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return float(text)


def whole(text: str) -> int:
    """A whole number in decimal digits."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def arguments() -> Arguments:
    """The commands and their options."""
    parser = Arguments(prog="lovely-llama", allow_abbrev=False, description="Run Llama models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Arguments)
    for name, what in (("chat", "answer PROMPT, or hold a conversation"), ("generate", "continue PROMPT")):
        command = commands.add_parser(name, help=what, description=what + ".", allow_abbrev=False)
        command.add_argument("prompt", metavar="PROMPT", nargs="?" if name == "chat" else None)
        option = partial(command.add_argument, default=None)
        option("--model", type=Path, metavar="PATH", help="a .gguf, or llama2.c's .bin (default: SmolLM2)")
        option("--max-new", type=whole, metavar="N", help="at most N new tokens (default: up to the context's end)")
        option("--temperature", type=number, metavar="T", help="0 always takes the likeliest token (default: 0.6)")
        option("--top-k", type=whole, metavar="K", help="sample from the K likeliest tokens")
        option("--top-p", type=number, metavar="P", help="sample from the likeliest that sum to P (default: 0.9)")
        option("--min-p", type=number, metavar="P", help="only tokens at least P times as likely as the likeliest")
        option("--repetition-penalty", type=number, metavar="R", help="divide the logits of tokens seen before by R")
        option("--seed", type=whole, metavar="N", help="the same text every time (default: a new seed)")
        option("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given more than once")
        if name == "chat":
            option("--system", metavar="TEXT", help="the system message")
    return parser


def say(generation: Generation) -> str:
    """Print text as it comes, then a line of statistics on stderr. Return the text."""
    text = ""
    for part in generation:
        text += part
        print(part, end="", flush=True)
    print(flush=True)
    times, reason = generation.times, generation.reason
    # The prompt's time includes the first new token, and the second may wait for a compilation.
    prompt = len(generation.prompt) / (times[1] - times[0]) if len(times) > 1 else 0
    decode = (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else 0
    end = {"stop": "ended", "length": "cut at --max-new", "context": "cut where the context ends"}[reason]
    counts = f"prompt {len(generation.prompt)} tokens, {prompt:.1f}/s; new {len(generation.tokens)}, {decode:.1f}/s"
    print(f"{counts}; {end}", file=sys.stderr)
    return text


def talk(args: argparse.Namespace) -> None:
    """The commands `chat` and `generate`."""
    for field in ("prompt", "system"):
        check_text(field, getattr(args, field, None) or "")
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    sampling = Sampling(**{name: value for name in names if (value := getattr(args, name)) is not None})
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    model = load(args.model or default_model())
    more = partial(generate, model, max_new=args.max_new, sampling=sampling, seed=seed, stop=args.stop or ())
    if args.command == "generate":
        say(more(args.prompt))
        return
    session, messages = Session(model), [{"role": "system", "content": args.system}] if args.system else []
    for line in lines() if args.prompt is None else [args.prompt]:
        messages.append({"role": "user", "content": line})
        answer = say(more(chat_prompt(model.tokenizer, messages), session=session))
        messages.append({"role": "assistant", "content": answer})


def lines() -> Iterator[str]:
    """The lines of stdin, up to /bye or its end. On a terminal each is prompted for, wherever stdout goes."""
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
        if line.strip():
            yield line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0; or 2 for bad input and 1 for a fault while running, with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        talk(arguments().parse_args(argv))
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if "--debug" in argv:
            raise
        known = isinstance(error, LlamaError | OSError | ArithmeticError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        print("error: " + " ".join(said.split()), file=sys.stderr)
        return 2 if isinstance(error, LlamaError) else 1
    return 0
