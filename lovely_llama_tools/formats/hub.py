"""Models by their names on the Hugging Face hub: found in the local cache, or downloaded into it."""

import re
import sys
from pathlib import Path

from lovely_llama import LlamaError

from ..extras import extra

WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]  # nothing else is downloaded
UNWANTED = ["*/*.safetensors", "*/*.json", "consolidated*"]  # the same model once more, in other formats


def is_name(text: str) -> bool:
    """Whether this has the form of a name on the hub, and is no path here."""
    form = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<!\.gguf)(?<!\.bin)(?<!\.pth)(?<!\.safetensors)"
    return bool(re.fullmatch(form, text, re.ASCII)) and not Path(text).parent.exists()


def fetch(name: str) -> Path:
    """The folder of a model in the hub's cache, downloaded unless it is there. A bar shows only on a terminal."""
    hub = extra("huggingface_hub", "hub")
    hidden = hub.utils.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        try:
            cached = Path(hub.snapshot_download(name, local_files_only=True))
            if is_complete(cached):
                return cached
        except hub.errors.LocalEntryNotFoundError:
            pass
        return Path(hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:
        says = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LlamaError(name, "hub", says, "a model in the cache, or one that can be downloaded") from error
    finally:
        if not hidden:
            hub.utils.enable_progress_bars()


def is_complete(folder: Path) -> bool:
    """Whether a model has been downloaded to its end, as far as config and weights go."""
    index = folder / "model.safetensors.index.json"
    shards = re.findall(r'"([\w.-]+\.safetensors)"', index.read_text() if index.exists() else "")
    return all((folder / name).exists() for name in {"config.json", *(shards or ["model.safetensors"])})
