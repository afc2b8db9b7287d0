"""Tokenizers: text to ids and back.

`base` defines `Tokenizer`; `pieces`, `ranks`, `characters` and `pipelines` are the kinds; `folders` and `gguf_fields`
find them in files, `parts` tokenizes long texts, `converting` writes tokenizers for other programs, `training` learns
new ones. `templates` are those of chats, which `rendering` renders in another process.
"""

from .base import Tokenizer as Tokenizer
from .base import check_text as check_text
from .base import fit as fit
from .base import segments as segments
from .base import usual_stops as usual_stops
from .converting import tokenizer_bin as tokenizer_bin
from .folders import NAMES as NAMES
from .folders import SETTINGS as SETTINGS
from .folders import TOKENIZER_FILES as TOKENIZER_FILES
from .folders import folder_tokenizer as folder_tokenizer
from .folders import tokenizer_files as tokenizer_files
from .gguf_fields import gguf_tokenizer as gguf_tokenizer
from .gguf_fields import tokenizer_fields as tokenizer_fields
from .gguf_fields import without_key as without_key
from .parts import encode_parts as encode_parts
from .pieces import bin_tokenizer as bin_tokenizer
from .pieces import sentencepiece_tokenizer as sentencepiece_tokenizer
from .ranks import gpt2_tokenizer as gpt2_tokenizer
from .templates import Refused as Refused
from .templates import check_template as check_template
from .templates import render as render
from .templates import render_all as render_all
