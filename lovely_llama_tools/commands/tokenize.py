"""The command `tokenize`: training tokenizers, and showing the tokens of a text."""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lovely_llama import LlamaError, check

from ..data.corpora import TEXTS, corpus_files, read_texts
from ..extras import counted
from ..formats.files import default_model, load_tokenizer, publish
from ..tokens import Tokenizer, check_text, encode_parts, tokenizer_bin, tokenizer_files
from ..tokens.folders import CONFIG, SOURCES
from ..tokens.training import train_bpe, train_characters, train_sentencepiece
from .options import READ, add_command, add_subcommands, reading, whole

TRAIN = {
    "data": {"corpus": dict(metavar="CORPUS", nargs="+", help="text files, JSON lines (.jsonl), or folders of both")},
    "tokenizer": {
        "--kind": dict(choices=("bpe", "sentencepiece", "chars"), default="bpe", help="byte-level BPE, as Llama 3 has; "
                       "SentencePiece's BPE, as Llama 2 has; or one token per character (default: bpe)"),
        "--vocab": dict(type=whole, metavar="N", help="vocabulary size (chars: at most, default all that occur)"),
    },
    "output": {
        "--out": dict(required=True, metavar="FOLDER", help="where to write it; a model's folder makes it the model's"),
        "--force": dict(action="store_true", help="replace the tokenizer that is there"),
    },
}  # fmt: skip
SHOW = {
    "text": {"text": dict(metavar="TEXT", help="the text to tokenize")},
    "tokenizer": {
        "--model": dict(metavar="PATH", help="a model, or a folder with a tokenizer (default: SmolLM2)"),
        **READ,
        "--special": dict(action="store_true", help="read names of special tokens in TEXT as those tokens"),
    },
}
TRAINS = """
lovely-llama tokenize train book.txt --vocab 512 --out tokenizer
lovely-llama tokenize train book.txt --kind chars --out letters
"""
SHOWS = """
lovely-llama tokenize show "Hello, world!"
lovely-llama tokenize show "To be" --model run/best
"""
EXTRAS = {"chat": "--kind bpe, tokenizer.json and GGUF files"}


def add(commands: Any) -> None:
    """Add the command and its two actions."""
    what = "train a tokenizer, or show the tokens of a text"
    command = add_command(
        commands,
        "tokenize",
        what,
        None,
        {},
        examples=f"{TRAINS.splitlines()[1]}\n{SHOWS.splitlines()[1]}",
        extras=EXTRAS,
    )
    actions = add_subcommands(command, "action")
    what = "train a tokenizer on texts, and write it into a folder"
    add_command(actions, "train", what, train, TRAIN, examples=TRAINS, extras=EXTRAS)
    about = "Print the token ids that `generate` sees of a text beside their pieces, with BOS where the model adds it."
    add_command(actions, "show", "print the tokens of a text", show, SHOW, about=about, examples=SHOWS, extras=EXTRAS)


def train(args: argparse.Namespace) -> None:
    """Train a tokenizer and write it. With --force it replaces every tokenizer in the folder."""
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
    print(f"{out}: {counted(len(tokenizer.pieces), 'token', ',')} in {', '.join(files)}")


def show(args: argparse.Namespace) -> None:
    """Print a line for each token."""
    check_text("text", args.text)
    tokenizer = load_tokenizer(args.model or default_model(), **reading(args))
    bos = tokenizer.begin("")[:1] if tokenizer.adds_bos or not args.text else []
    names = {i: name for name, i in tokenizer.specials.items()}
    for i in chain(bos, *encode_parts(tokenizer, args.text, args.special)):
        print(f"{i:>7}  {names.get(i) or piece_text(tokenizer.pieces[i])}")


def piece_text(piece: bytes) -> str:
    """A piece as a Python literal: of bytes where it is not whole characters."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
