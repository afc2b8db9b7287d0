"""The command `tokenize`: a tokenizer learned from texts, and the tokens of a text side by side with its pieces."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, check

from .corpora import TEXTS, corpus_files, read_texts
from .files import default_model, load_tokenizer, publish
from .options import Arguments, add_command, whole
from .tokens import Tokenizer, check_text, tokenizer_bin, tokenizer_files
from .tokens.folders import CONFIG, SOURCES
from .tokens.training import train_bpe, train_characters, train_sentencepiece


def add(commands: Any) -> None:
    """Add the command, its two actions and their options."""
    command = add_command(commands, "tokenize", "train a tokenizer, or show the tokens of a text", train)
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Arguments)
    action = add_command(actions, "train", "learn a tokenizer from texts, and write it into a folder", train)
    action.add_argument("corpus", metavar="CORPUS", nargs="+", help="text files, JSON lines, or folders of both")
    action.add_argument("--kind", choices=("bpe", "sentencepiece", "chars"), default="bpe", help="(default: bpe)")
    action.add_argument("--vocab", type=whole, metavar="N", help="number of tokens (chars: those that occur)")
    action.add_argument("--out", required=True, metavar="FOLDER", help="where it goes; beside a model, load finds it")
    action.add_argument("--force", action="store_true", help="replace the tokenizer that is there")
    action = add_command(actions, "show", "print the ids of TEXT beside their pieces, BOS and EOS around them", show)
    action.add_argument("text", metavar="TEXT", help="a text")
    known = "a model, or a folder with a tokenizer (default: SmolLM2)"
    action.add_argument("--model", metavar="PATH", help=known)
    action.add_argument("--special", action="store_true", help="names of special tokens in TEXT mean those tokens")


def train(args: argparse.Namespace) -> None:
    """Learn a tokenizer, and write it: over nothing unless forced, and then in place of every tokenizer there."""
    out, corpus = Path(args.out), read_texts(corpus_files(args.corpus, TEXTS))
    check("vocab", "nothing", args.vocab is not None or args.kind == "chars", "a number of tokens")
    there = [name for name in (*SOURCES, CONFIG) if (out / name).exists()]
    check("path", f"a folder with a {' and a '.join(there)}", args.force or not there, "one without, or --force", out)
    kinds: dict[str, Callable[[Iterator[str], Any], Tokenizer]] = {
        "bpe": train_bpe, "sentencepiece": train_sentencepiece, "chars": train_characters,
    }  # fmt: skip
    tokenizer = kinds[args.kind](corpus, args.vocab)
    files = tokenizer_files(tokenizer)
    if args.kind == "sentencepiece":  # what needs no package, and run.c's
        files = {name: data for name, data in files.items() if name != "tokenizer.json"}
        files["tokenizer.bin"] = tokenizer_bin(tokenizer)
    part = out / f".tokenizer.part{os.getpid()}"
    try:
        part.mkdir(parents=True)
        try:
            for name, data in files.items():
                (part / name).write_bytes(data)
            for name in {*there} - files.keys():
                (out / name).unlink()
            for name in files:
                publish(part / name, out / name)
        finally:
            shutil.rmtree(part)
    except OSError as error:
        raise LlamaError(out, "path", error.strerror, "a folder that can be written to") from error
    print(f"{out}: {len(tokenizer.pieces):,} tokens in {', '.join(files)}")


def show(args: argparse.Namespace) -> None:
    """Print a line for each token."""
    check_text("text", args.text)
    tokenizer = load_tokenizer(args.model or default_model())
    ids = [tokenizer.bos, *tokenizer.encode(args.text, args.special), tokenizer.eos]
    names = {i: name for name, i in tokenizer.specials.items()}
    for i in (i for i in ids if i is not None):
        print(f"{i:>7}  {names.get(i) or piece_text(tokenizer.pieces[i])}")


def piece_text(piece: bytes) -> str:
    """A piece as it is shown: as Python would write it, with its bytes where they are part of a character."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
