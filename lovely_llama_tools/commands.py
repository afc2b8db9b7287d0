"""The command line: what can be asked, and what each command prints."""

import argparse
import importlib
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lovely_llama import SAMPLERS, LlamaError, Sampling, __version__

from .chat import chat_prompt, recent
from .files import default_model, load
from .formats import Model
from .generate import Generation, Session, generate
from .tokens import check_text

HELP = "/bye or Ctrl-D ends the conversation, Ctrl-C an answer, /help shows this"


class Arguments(argparse.ArgumentParser):
    """A parser that raises LlamaError in place of printing its usage."""

    def error(self, message: str) -> Any:
        unquoted = re.match("unrecognized arguments: [^-]", message)
        raise LlamaError("arguments", self.prog, message, "one PROMPT, in quotes" if unquoted else "what --help says")


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
    parser.add_argument("--version", action="version", version=f"lovely-llama {__version__}")
    debug = partial(dict[str, Any], action="store_true", help="show the traceback of an error")
    parser.add_argument("--debug", **debug())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Arguments)
    for name, what in (("chat", "answer PROMPT, or hold a conversation"), ("generate", "continue PROMPT")):
        command = commands.add_parser(name, help=what, description=what + ".", allow_abbrev=False)
        says = "a text; what is piped in comes after it; - stands for that alone"
        command.add_argument("prompt", metavar="PROMPT", nargs="?" if name == "chat" else None, help=says)
        option = partial(command.add_argument, default=None)
        option("--model", metavar="PATH", help="a .gguf, or llama2.c's .bin (default: SmolLM2)")
        option("--max-new", type=whole, metavar="N", help="at most N new tokens (default: up to the context's end)")
        for sampler, about in SAMPLERS.items():
            default = getattr(Sampling(), sampler)
            shown = "" if default is None else f" (default: {default})"
            flag, kind = f"--{sampler.replace('_', '-')}", whole if about.most is None else number
            option(flag, type=kind, metavar="N" if kind is whole else "X", help=about.says + shown)
        option("--seed", type=whole, metavar="N", help="the same text every time (default: a new seed)")
        option("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given more than once")
        if name == "chat":
            option("--system", metavar="TEXT", help="the system message (default: the template's own)")
        command.add_argument("--quiet", action="store_true", help="no line of statistics on stderr")
        command.add_argument("--debug", **debug(default=argparse.SUPPRESS))
    return parser


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


def talk(args: argparse.Namespace) -> None:
    """The commands `chat` and `generate`."""
    for field in ("prompt", "system"):
        check_text(field, getattr(args, field, None) or "")
    chosen = {name: getattr(args, name) for name in SAMPLERS if getattr(args, name) is not None}
    sampling = Sampling(**chosen)
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    if args.prompt is not None:
        texts = ["" if args.prompt == "-" else args.prompt, piped()]
        vars(args)["prompt"] = "\n".join(filter(None, texts))
    model = load(args.model or default_model())
    more = partial(generate, model, max_new=args.max_new, sampling=sampling, seed=seed, stop=args.stop or ())
    if args.command == "generate":
        say(more(args.prompt or ""), args.quiet)
    else:
        converse(model, more, args)


ANSWERING = list[Generation]()  # the answer in a conversation on a terminal, which Ctrl-C ends


def interrupt() -> bool:
    """End the answer of a conversation on a terminal; False where there is none, or it was to end already."""
    if not ANSWERING:
        return False
    ANSWERING.pop().interrupt()
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
            ANSWERING.extend([generation] if alive else [])
            answer = say(generation, args.quiet)
        except LlamaError as error:
            if not alive:
                raise
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
        else:
            messages = [*fitting, {"role": "assistant", "content": answer}]
        finally:
            ANSWERING.clear()


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
