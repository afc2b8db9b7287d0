"""The training loop: from the data to the last checkpoint, interruptible and resumable at any step."""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from lovely_llama import Config, Params, check, learning_rate

from ..data.prepare import Batch, Corpus, Split, ahead, prepare
from ..devices.cluster import agree_on, code, gathered, in_turn, index, joined, largest, own_rows, spread
from ..devices.mesh import batch_sharding, check_seq, places
from ..extras import counted, extra
from ..fast.layers import in_tuple
from ..formats.adapters import save_adapter
from ..formats.files import BEST, RUN, checkpoint, load, load_tokenizer
from ..formats.model import Checkpoint as SavedModel
from ..formats.model import Model, check_memory, share
from ..formats.orbax import is_orbax
from ..inference.generate import generate
from ..interrupts import ending
from ..tokens import fit
from .checkpoints import Checkpointer, restore
from .metrics import MetricsLogger, SilentLogger, metrics_logger
from .run_folder import (
    DATA,
    LOCK,
    Checkpoint,
    Progress,
    check_fingerprints,
    check_new,
    locked,
    read_checkpoint,
    step_path,
    steps,
    write_json,
)
from .settings import (
    LEARNED,
    Settings,
    fingerprints_of,
    mesh_of,
    new_config,
    row_length,
    step_options,
    versions,
)
from .step import (
    StepOptions,
    TrainState,
    batch_loss,
    initial_state,
    merged,
    new_adapters,
    new_params,
    stacked,
    step,
)

MAX_SKIPPED = 3  # consecutive steps without a finite gradient before a run fails
INIT_STD = 0.02  # of `init`
PATHS = ("data", "init_from", "tokenizer")  # settings that may differ between machines


class Stop:
    """Set by a signal, read between steps. Several processes stop after the same step."""

    def __init__(self) -> None:
        self.signal = self.seen = 0  # the signal that all stop on; the one that this process has received

    def take(self, number: int) -> bool:
        """Whether this is the first signal. The step is completed after it; a second one ends the process."""
        first, self.seen = not self.seen, number
        return first

    def asked(self) -> bool:
        """Whether to stop. A collective operation: all processes call it at the same point."""
        self.signal = largest(self.seen)
        return bool(self.signal)


class Run(NamedTuple):
    """What stays the same throughout a run."""

    folder: Path
    settings: Settings
    corpus: Corpus
    config: Config
    options: StepOptions
    checkpointer: Checkpointer
    stop: Stop
    logger: MetricsLogger
    rows: NamedSharding | None  # of a batch


def train(settings: Settings, folder: Path, at: int | None, resuming: bool, allowed: Sequence[str], debug: bool) -> int:
    """Start a run, or resume it from the checkpoint of step `at`. The exit status is 128 + n after signal n."""
    stop = Stop()
    if settings.checkpoints == "orbax" or (at is not None and is_orbax(step_path(folder, at))):
        extra("orbax.checkpoint", "scale")
    with ExitStack() as stack:
        stack.enter_context(ending(stop.take))
        stack.enter_context(joined(debug))
        writes = index() == 0
        if writes:
            stack.enter_context(locked(folder))
        if writes and not resuming:
            check_new(folder)
        agree_on(lambda: {"code": code(), **{name: v for name, v in settings._asdict().items() if name not in PATHS}})
        mesh = mesh_of(settings)
        corpus, config, state, saved, fingerprints = start(folder, settings, mesh, at, allowed)
        weights = partial(base_digest, settings.init_from, allowed) if saved is None else lambda: saved.checksum
        agree_on(lambda: {**fingerprints, "weights": weights(), "out": holder(folder, settings), "versions": ""})
        if mesh:
            check_seq(corpus.train.seq, mesh.shape)
            stack.enter_context(jax.set_mesh(mesh))
        state = restore(saved, state, config, mesh) if saved else state
        progress, rows = saved.progress if saved else Progress(), batch_sharding(mesh) if mesh else None
        described = {"options": settings._asdict(), "config": asdict(config), "fingerprints": fingerprints}
        if writes:
            write_json(folder / RUN, {**described, "versions": versions()})
        for line in corpus.says if writes else ():
            print(line, file=sys.stderr)
        logger = stack.enter_context(
            metrics_logger(folder, progress, settings.steps) if writes else nullcontext(SilentLogger())
        )
        lora = {"base": settings.init_from, "rank": settings.lora, "alpha": settings.lora_alpha}
        beside = partial(save_adapter, config=config, **cast(Any, lora)) if settings.lora else None
        options, form = step_options(settings, config), cast(str, settings.checkpoints)
        tokenizer = corpus.tokenizer and fit(corpus.tokenizer, config.vocab, "tokenizer")
        checkpointer = stack.enter_context(
            Checkpointer(folder, form, config, tokenizer, options.scale, fingerprints, settings.keep, beside)
        )
        run = Run(folder, settings, corpus, config, options, checkpointer, stop, logger, rows)
        if at is None:
            checkpointer.save(state, progress)
            checkpointer.wait()  # fails now rather than hours later if saving is impossible
        return report_end(run, train_steps(run, state, progress))


def holder(folder: Path, settings: Settings) -> str | None:
    """The process that has locked the folder: all processes must see the same, unless process 0 alone writes there."""
    if settings.checkpoints == "hf":
        return None
    return (folder / LOCK).read_text() if (folder / LOCK).exists() else "another folder"


# ---- Data and initial state ------------------------------------------------------------------------------------------


def start(
    folder: Path, settings: Settings, mesh: Mesh | None, at: int | None, allowed: Sequence[str]
) -> tuple[Corpus, Config, TrainState, Checkpoint | None, dict[str, Any]]:
    """The data, the initial state (or its shapes, for a checkpoint), the checkpoint, and the fingerprints."""
    saved = None if at is None else read_checkpoint(folder, at)
    corpus, config, state = initialised(folder, settings, mesh, saved is not None, allowed)
    base = {"base": base_digest(settings.init_from, allowed)} if settings.lora else {}  # which the adapters need
    fingerprints = fingerprints_of(settings, config, {**corpus.fingerprints, **base})
    if saved:
        check_fingerprints(saved, fingerprints, allowed, lambda text: print(f"note: {text}", file=sys.stderr))
    return corpus, config, state, saved, fingerprints


def initialised(
    folder: Path, settings: Settings, mesh: Mesh | None, shapes_alone: bool, allowed: Sequence[str]
) -> tuple[Corpus, Config, TrainState]:
    """The data, and the initial state, created directly on its devices; or its shapes alone."""
    base = load(settings.init_from, "float32", mesh, allow=allowed) if settings.init_from else None
    with in_turn("data"):
        corpus = corpus_of(settings, folder / DATA, base, replace=not shapes_alone)
    config = base.config if base else new_config(settings, corpus.vocab)
    check("vocab", corpus.vocab, corpus.vocab <= config.vocab, f"at most {config.vocab}, the model's", "data")
    check("lora", settings.lora, (settings.lora or 1) <= config.dim, f"at most the width, {config.dim}")
    check_memory(16 * share(config, mesh), "config")  # parameters, gradients, and two moments

    def begin(rng: Key[Array, ""], base: Params | None) -> TrainState:
        params = stacked(base) if base else None
        if params is None or not settings.lora:
            return initial_state(None, params or new_params(rng, config, (settings.init_std or INIT_STD) / INIT_STD))
        names = settings.lora_targets.split(",")
        return initial_state(params, new_adapters(rng, cast(Any, params.blocks), settings.lora, names))

    given = jax.random.key(settings.seed), base.params if base else None
    shapes = jax.eval_shape(begin, *given)
    if shapes_alone and not settings.lora:
        return corpus, config, shapes
    begin = jax.jit(begin, out_shardings=places(shapes, config, mesh)) if mesh else begin
    return corpus, config, begin(*given)


def corpus_of(settings: Settings, folder: Path, base: Model | SavedModel | None, *, replace: bool) -> Corpus:
    """The data, prepared in a folder, for a model to train on from if there is one."""
    named = settings.tokenizer or (base.tokenizer if base else None)
    tokenizer = load_tokenizer(named) if isinstance(named, str) and named not in LEARNED else named
    if base and tokenizer and not isinstance(tokenizer, str):
        tokenizer = fit(tokenizer, base.config.vocab, settings.tokenizer or settings.init_from)
    return prepare(
        settings.data, folder, tokenizer=tokenizer, vocab=settings.vocab,
        seq=row_length(settings, base.config if base else None), fraction=settings.val_fraction, pack=settings.pack,
        replace=replace, special=settings.special_tokens,
    )  # fmt: skip


def show(settings: Settings, allowed: Sequence[str]) -> str:
    """The first row as the model sees it, with what is learned of it between ⟦ and ⟧."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        base = stack.enter_context(checkpoint(settings.init_from, allow=allowed)) if settings.init_from else None
        corpus = corpus_of(settings, Path(folder), base, replace=True)
        ids, learned = corpus.train.first()
    for line in corpus.says:
        print(line, file=sys.stderr)
    if corpus.tokenizer is None:
        return " ".join(f"⟦{i}⟧" if own else str(i) for i, own in zip(ids, learned, strict=True))
    names = {token: name.encode() for name, token in corpus.tokenizer.specials.items()}
    shown, within = b"", False
    for i, own in zip(ids, learned, strict=True):
        shown += b"" if own == within else "⟦".encode() if own else "⟧".encode()
        shown, within = shown + (names.get(i) or corpus.tokenizer.pieces[i]), own
    return shown.decode(errors="replace") + ("⟧" if within else "")


def base_digest(path: str | None, allowed: Sequence[str]) -> str:
    """The SHA-256 of the parameters of --init-from, if given."""
    if path is None:
        return ""
    with checkpoint(path, allow=allowed) as found:
        return found.digest()


# ---- The loop --------------------------------------------------------------------------------------------------------


def train_steps(run: Run, state: TrainState, progress: Progress) -> Progress:
    """Train until the last step, a signal, or --patience evaluations without improvement."""
    s = run.settings
    if progress.owed and not finished(run, progress):
        progress = evaluate(run, state, progress, run.logger.pending)
        run.checkpointer.save(state, progress)
    own = own_rows(run.rows, s.batch, run.corpus.train.seq) if run.rows else range(s.batch)
    batches = ahead(lambda n: run.corpus.train.batch(s.seed, n, s.batch, own), range(progress.step, s.steps))
    for batch in () if finished(run, progress) else batches:
        state, progress, row = train_step(run, state, progress, rows_of(run, batch, own))
        last = progress.step == s.steps
        if last or progress.step % cast(int, s.eval_every) == 0:
            progress = evaluate(run, state, progress, row)
        else:
            run.logger.step(row)
        due = progress.best_step == progress.step or progress.step % cast(int, s.save_every) == 0
        if due:
            run.checkpointer.save(state, progress)
        if finished(run, progress):
            if not due:
                run.checkpointer.save(state, progress)
            break
    run.checkpointer.wait()
    return progress


def finished(run: Run, progress: Progress) -> bool:
    """Whether training ends here."""
    patience = run.settings.patience
    stalled = patience is not None and progress.stale >= patience
    return run.stop.asked() or stalled or (progress.step >= run.settings.steps and not progress.owed)


def train_step(
    run: Run, state: TrainState, progress: Progress, rows: tuple[Any, ...]
) -> tuple[TrainState, Progress, dict[str, Any]]:
    """One optimiser step: the new state and progress, and the step's metrics."""
    s, began = run.settings, time.perf_counter()
    rate = learning_rate(progress.step, s.lr, cast(int, s.warmup), s.steps, cast(float, s.final_lr))
    trained, moments, measured = step(
        state.base, state.trained, state.moments, cast(Any, np.float32(rate)), rows, run.options
    )
    loss, norm, finite = float(measured.loss), float(measured.grad_norm), bool(measured.finite)
    took = time.perf_counter() - began
    progress = progress._replace(
        step=progress.step + 1, updates=progress.updates + finite,
        skipped=progress.skipped + (not finite), row=0 if finite else progress.row + 1,
    )  # fmt: skip
    if not finite:
        run.logger.line(f"step {progress.step}: skipped, as the loss is {loss} and the gradient's norm {norm}")
    if progress.row >= min(MAX_SKIPPED, s.steps):
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        raise diverged(run, what, f"{value} in {counted(progress.row, 'step')} in a row")
    row = {"step": progress.step, "train_loss": loss, "lr": rate, "grad_norm": norm}
    return TrainState(state.base, trained, moments), progress, {**row, "tokens_per_s": rows[0].size / took}


def diverged(run: Run, what: str, got: str) -> FloatingPointError:
    """The error that ends a run whose loss or gradient is not a number; the last checkpoint precedes it."""
    run.checkpointer.wait()
    last = step_path(run.folder, steps(run.folder)[-1])
    how = f"a finite one: a lower --lr may help, and {last} is still good"
    return FloatingPointError(f"{run.folder}: {what}: got {got}, which is not a number, expected {how}")


def rows_of(run: Run, batch: Batch, own: Sequence[int]) -> tuple[Any, ...]:
    """The arrays of a batch, of which this process holds the rows `own`."""
    arrays = [ids for ids in batch if ids is not None]
    return tuple(spread(ids, own, run.settings.batch, run.rows) if run.rows else ids for ids in arrays)


def evaluate(run: Run, state: TrainState, progress: Progress, row: dict[str, Any]) -> Progress:
    """The progress after an evaluation. One cut short by a signal is marked, and repeated on resume."""
    split = run.corpus.validation
    loss = validation_loss(run, state, split) if split else None
    if run.stop.signal and split:
        run.logger.step(row)
        return progress._replace(owed=True)
    progress = progress._replace(owed=False)
    if loss is not None:
        better = progress.best is None or loss < progress.best
        best = {"best": loss, "best_step": progress.step, "stale": 0} if better else {"stale": progress.stale + 1}
        progress, row = progress._replace(**best), {**row, "val_loss": loss}
    run.logger.step(row)
    if loss is not None and not math.isfinite(loss):
        raise diverged(run, "validation loss", f"{loss} after {counted(progress.step, 'step')}")
    if run.settings.sample:
        params = gathered(merged(state.base, state.trained, run.options.scale))
        if index() == 0:
            run.logger.sample(progress.step, sample(run, params))
    run.logger.draw()
    return progress


def validation_loss(run: Run, state: TrainState, split: Split) -> float:
    """The mean loss per target over the validation data, or over its first --eval-batches batches."""
    total, targets = 0.0, 0
    for batch in split.sweep(run.settings.batch, run.settings.eval_batches):
        if run.stop.asked():
            break
        n = int((batch.targets >= 0).sum())
        loss = batch_loss(state.base, state.trained, rows_of(run, batch, range(run.settings.batch)), run.options)
        total, targets = total + n * float(loss), targets + n
    return total / max(targets, 1)


def sample(run: Run, params: Params) -> str:
    """An answer to the first prompt held out, after that prompt; else a text after BOS, a newline, or token 0."""
    tokenizer = run.checkpointer.tokenizer
    prompt = prompt_of(run.corpus.validation or run.corpus.train)
    model = Model(run.config, jax.device_put(in_tuple(params)), tokenizer)
    start = tokenizer.begin("") if tokenizer else []
    newlines = [i for i, piece in enumerate(tokenizer.pieces) if piece == b"\n"] if tokenizer else []
    room = min(run.settings.sample, run.config.ctx - 1)
    start = prompt[: run.config.ctx - room] or start or newlines[:1] or [0]
    parts = [tokenizer.decode(start) if tokenizer and prompt else ""]
    with jax.set_mesh(None):  # a single process generates, and cannot use the devices of the others
        for part in generate(model, start, room, seed=run.settings.seed):
            parts.append(part if isinstance(part, str) else f"{part} ")
            if run.stop.seen:
                break
    return "".join(parts)


def prompt_of(split: Split) -> list[int]:
    """The tokens before the first answer; none where texts are learned whole."""
    ids, learned = split.first()
    return ids[: learned.index(True)] if not all(learned[1:]) else []


def report_end(run: Run, progress: Progress) -> int:
    """Print the result on stdout, or an interruption on stderr; the exit status."""
    done = counted(progress.step, "step") + (f", {progress.skipped} skipped" if progress.skipped else "")
    if run.stop.signal and (progress.step < run.settings.steps or progress.owed):
        where = step_path(run.folder, progress.step)
        run.logger.line(f"interrupted after {done}; {where} is saved, --resume goes on")
        return 128 + run.stop.signal
    run.logger.line(done)
    if index():
        return 0
    if progress.best is None:
        print(step_path(run.folder, progress.step))
    else:
        best = f"validation loss {progress.best:.4f} after {counted(progress.best_step or 0, 'step')}"
        print(f"{run.folder / BEST}: {best}")
    return 0
