"""Links out of a model's folder: one for each door, and for each file that is read there. Variants of B13."""

import shutil
from collections.abc import Callable
from pathlib import Path

from builders import tiny_arrays, tiny_fields, write_gguf, write_sentencepiece
from faults import Variant, World, refused, unchecked
from meta_files import META, meta_weights, write_meta

from lovely_llama_tools import folder_tokenizer, load, save
from lovely_llama_tools.formats.files import load_tokenizer
from lovely_llama_tools.tokens import tokenizer_bin, tokenizer_files

SOURCES = ("characters.json", "tokenizer.json", "tokenizer.model", "tokenizer.bin")  # of which the first is read
SPECIALS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/more.jinja", "additional_chat_templates")


def linked(make: Callable[[World, Path], object], door: Callable[[Path], object], name: str) -> Variant:
    """Make a folder, put one of its files elsewhere and a link in its place, and open it by a door."""

    def act(world: World) -> None:
        folder = world.folder / "model"
        make(world, folder)
        (folder / name).rename(world.folder / "elsewhere")
        (folder / name).symlink_to(world.folder / "elsewhere")
        door(folder)

    return refused(act, "path", rf"/{name}.*: got a link to .*elsewhere", unchecked("path"))


def tokenizer(name: str) -> Callable[[World, Path], None]:
    """A folder with all files of a tokenizer, but for those that come before this one."""

    def make(world: World, folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir(parents=True)
        write_sentencepiece(folder / "tokenizer.model", 41)
        found = folder_tokenizer(folder)
        assert found
        files = {"characters.json": b'{"characters": "abc"}', "tokenizer.bin": tokenizer_bin(found)}
        files |= tokenizer_files(found) | dict.fromkeys(SPECIALS, b"{}") | dict.fromkeys(TEMPLATES[:2], b"Hello")
        for path, data in files.items():
            (folder / path).write_bytes(data)
        for earlier in SOURCES[: SOURCES.index(name)] if name in SOURCES else ():
            (folder / earlier).unlink()

    return make


def hugging_face(world: World, folder: Path) -> None:
    save(world.model, folder)


def llama2c(world: World, folder: Path) -> None:
    save(world.model, folder / "model.bin")


def split(world: World, folder: Path) -> None:
    folder.mkdir()
    write_gguf(folder / "model.gguf", tiny_fields(), tiny_arrays(), split=12)


def meta(world: World, folder: Path) -> None:
    write_meta(folder, meta_weights(META))
    write_sentencepiece(folder / "tokenizer.model", 40)


HUGGING_FACE = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LINKS: dict[str, Variant] = {
    **{f"folder_tokenizer: {name}": linked(tokenizer(name), folder_tokenizer, name) for name in (*SOURCES, *SPECIALS)},
    **{f"load_tokenizer: {name}": linked(tokenizer(name), load_tokenizer, name) for name in TEMPLATES},
    **{f"load: {name}": linked(hugging_face, load, name) for name in HUGGING_FACE},
    "load: a tokenizer beside a .bin": linked(llama2c, lambda folder: load(folder / "model.bin"), "tokenizer.json"),
    "load: a part of a GGUF": linked(
        split, lambda folder: load(folder / "model-00001-of-00002.gguf"), "model-00002-of-00002.gguf"
    ),
    **{f"load: {name}": linked(meta, load, name) for name in ("params.json", "consolidated.00.pth", "tokenizer.model")},
}


def named(world: World) -> None:
    """What the user names may be a link, to a file or to a folder, and so may what leads from a file to another one."""
    for make, name in ((hugging_face, ""), (llama2c, "model.bin"), (split, "model-00001-of-00002.gguf")):
        folder = world.folder / "named"
        make(world, folder)
        for i, path in enumerate([*folder.iterdir()]):
            path.rename(folder / f"moved{i}")
            path.symlink_to(f"../named/moved{i}")
        (world.folder / "link").symlink_to(folder)
        load(world.folder / "link" / name)
        (world.folder / f"alone{name}").symlink_to(folder / name)
        if make is not split:  # whose parts are looked for beside the link
            load(world.folder / f"alone{name}")
        (world.folder / "link").unlink()
        shutil.rmtree(folder)
