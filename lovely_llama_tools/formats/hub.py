"""Models by their names on the Hugging Face hub: found in the local cache, or downloaded into it."""

import logging
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lovely_llama import LlamaError, check

from ..extras import extra
from ..tokens.base import small_file
from ..tokens.folders import CONFIG as TOKENIZER
from ..tokens.folders import SOURCES, SPECIALS
from .hugging_face import ADAPTED, ADAPTER, CONFIG, GENERATION, INDEX, WEIGHTS

OTHER = "vocab.json"  # of a tokenizer that is not read; it tells that none of `SOURCES` is missing
# All that is downloaded.
WANTED = [CONFIG, GENERATION, INDEX, ADAPTER, "*.safetensors", *SOURCES, *SPECIALS, "*.jinja", OTHER]
UNWANTED = ["*/*.safetensors", "consolidated*"]  # the same model once more, in other formats
FOUND = "a model in the cache, or one that can be downloaded"
ACCESS = "access: ask for it on the model's page, and log in with: hf auth login"
# What exceptions of huggingface_hub, and of httpx beneath it, mean: what was found, and what should have been.
MEANING = {
    "GatedRepoError": ("a gated model", ACCESS),
    "RepositoryNotFoundError": ("no such model, or a private one", f"{FOUND}; of a private one, hf auth login"),
    "RevisionNotFoundError": ("a model without a branch main", FOUND),
    "DisabledRepoError": ("a model that the hub has disabled", FOUND),
    "OfflineModeIsEnabled": ("none in the cache, and HF_HUB_OFFLINE is set", FOUND),
    "TransportError": ("none in the cache, and no connection", FOUND),
}


def is_name(text: str) -> bool:
    """Whether this has the form of a name on the hub, and is no path here."""
    form = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<!\.gguf)(?<!\.bin)(?<!\.pth)(?<!\.safetensors)"
    return bool(re.fullmatch(form, text, re.ASCII)) and not Path(text).parent.exists()


def fetch(name: str) -> Path:
    """The folder of a model in the hub's cache, after what it lacks has been downloaded.

    Without a connection, what is in the cache must be complete.
    """
    hub = extra("huggingface_hub", "hub")

    def find(**more: bool) -> Path:
        return Path(hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, **more))

    try:
        with quiet():
            try:
                folder = find()
            except Exception as error:
                if "TransportError" not in names_of(error):  # such as a proxy's refusal, which the package passes on
                    raise
                folder = find(local_files_only=True)
    except Exception as error:
        raise LlamaError(name, "hub", *meaning(error)) from error
    for path in needed(folder):
        check("path", "no such file", path.exists(), "a model in .safetensors, downloaded to its end", path)
    return folder


@contextmanager
def quiet() -> Generator[None]:
    """Let the hub's package show nothing but errors, and bars only on a terminal."""
    utils, log = extra("huggingface_hub.utils", "hub"), logging.getLogger("huggingface_hub")
    hidden, level = utils.are_progress_bars_disabled(), log.level
    log.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not hidden:
            utils.enable_progress_bars()


def names_of(error: BaseException | None) -> list[str]:
    """The names of an exception's classes. Their modules differ from version to version of the package."""
    return [kind.__name__ for kind in type(error).__mro__]


def meaning(error: Exception) -> tuple[str, str]:
    """What was found and what should have been, by the exception or its cause, else by its message."""
    if lacks := re.search(r"missing \((.+?)\)", str(error)):  # an IncompleteSnapshotError
        return f"a part of it in the cache, without {lacks[1]}", "a connection, to download the rest"
    chain = (error, error.__cause__ or error.__context__)
    if known := [name for seen in chain for name in names_of(seen) if name in MEANING]:
        return MEANING[known[0]]
    for response in (getattr(seen, "response", None) for seen in chain):
        if response is not None:
            status = response.status_code
            return f"the answer {status} {response.reason_phrase}", ACCESS if status in (401, 403) else FOUND
    return next(iter(str(error).strip().splitlines()), type(error).__name__), FOUND


def needed(folder: Path) -> list[Path]:
    """The files without which a model is incomplete, whatever else there may be."""
    index = None if (folder / WEIGHTS).exists() else small_file(folder / INDEX, folder)
    shards = re.findall(r'"([\w.-]+\.safetensors)"', (index or b"").decode(errors="replace"))
    alone = (folder / ADAPTER).exists() and not (folder / CONFIG).exists()
    names = [ADAPTER, ADAPTED] if alone else [CONFIG, *(shards or [WEIGHTS])]
    if (folder / TOKENIZER).exists() and not any((folder / name).exists() for name in (*SOURCES, OTHER)):
        names.append("tokenizer.json")
    return [folder / name for name in names]
