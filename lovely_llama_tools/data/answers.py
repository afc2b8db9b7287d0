"""How well a model gives the answers of conversations, as training measures it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lovely_llama import LlamaError, check, is_whole

from ..extras import counted
from ..formats.model import Model, blamed_on
from ..inference.scoring import CTX, Score, perplexity, scores
from .conversations import Encoder, Learned
from .records import Conversation, read_records


def score_records(model: Model, path: Path, ctx: int | None = None, stride: int | None = None) -> Iterator[Score]:
    """The score of each row: of a text, its `perplexity`; of a conversation, that of the answers in its first `ctx`
    tokens, each given all that precedes it. Rows without any are left out, and counted on stderr."""
    if model.tokenizer is None:
        raise LlamaError("model", "tokenizer", "none", "a model with one, to read conversations")
    most = min(model.config.ctx, CTX) if ctx is None else ctx
    check("ctx", repr(ctx), is_whole(most) and 2 <= most <= model.config.ctx, f"2 to {model.config.ctx}")
    encoder, skipped = None, list[str]()
    for where, record in read_records(path):
        with blamed_on(where):
            if not isinstance(record, Conversation):
                yield perplexity(model, record, ctx, stride)
                continue
            encoder = encoder or Encoder(model.tokenizer)
            (found,) = encoder.encode([record])
        ids, learned = (found.ids[: most + 1], found.answers[1 : most + 1]) if isinstance(found, Learned) else ([], [])
        if not any(learned):
            why = (
                f"{found.field}: got {found.got}"
                if isinstance(found, LlamaError)
                else f"no answer in {counted(most, 'token')}"
            )
            skipped.append(f"{where}: {why}")
            continue
        own = np.flatnonzero(learned)
        nats = scores(model, ids[:-1], ids[1:]).nats[own].astype(np.float64).sum()
        yield Score(float(nats), len(own), sum(len(model.tokenizer.pieces[ids[i + 1]]) for i in own))
    if skipped:
        print(f"note: {counted(len(skipped), 'row')} left out: {'; '.join(skipped[:3])}", file=sys.stderr)
