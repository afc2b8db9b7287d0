"""The command `train`: a run from its data to its last checkpoint, which may be interrupted and resumed anywhere."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from lovely_llama import Config, Params, check, learning_rate

from .children import again, watched
from .cluster import agree_on, code, gathered, in_turn, index, joined, largest, own_rows, several, spread
from .data import Batch, Corpus, Split, ahead, prepare
from .extras import extra
from .fast.layers import in_tuple
from .files import checkpoint, load, load_tokenizer
from .formats import Model, check_memory, share
from .formats.orbax import is_orbax
from .generate import generate
from .interrupts import PARENT, ending
from .journal import Journal, Quiet, journal
from .keeping import Keeper, restored
from .learn import (
    Learner,
    Recipe,
    batch_loss,
    beginner,
    merged,
    new_adapters,
    new_params,
    stacked,
    step,
)
from .mesh import batch_sharding, check_seq, places
from .options import add_command
from .runs import BEST, LOCK, RUN, Kept, State, agree, held, of_step, read_back, read_fields, steps, write_json
from .settings import Settings, add_options, fingerprints, mesh_of, new_config, recipe_of, row_length, settle, versions
from .tokens import fit

DATA, ROW = "data", 3  # the folder of tokens in a run; steps in a row that may be skipped before it ends
STD = 0.02  # of `init`
PATHS = ("data", "init_from", "tokenizer")  # which may differ from machine to machine


def add(commands: Any) -> None:
    """Add the command and its options."""
    command = add_command(commands, "train", "train a model on DATA, in a folder that also resumes it", train)
    texts = "texts, .jsonl of conversations or texts, folders of them, or token files (default: Python's own library)"
    command.add_argument("data", metavar="DATA", nargs="*", help=texts)
    command.add_argument("--out", metavar="RUN", default="run", help="the folder of the run (default: run)")
    again = "go on where RUN was left, with its options; or at one of its checkpoints, such as step-500"
    command.add_argument("--resume", nargs="?", const="", metavar="STEP", help=again)
    changed = "go on although KEY, an option or a fingerprint, is not as it was; may be given more than once"
    command.add_argument("--allow", action="append", default=[], metavar="KEY", help=changed)
    add_options(command)


class Stop:
    """Set by a signal, read between steps. Of several processes all stop after the same one."""

    def __init__(self) -> None:
        self.signal = self.seen = 0  # what all stop on; what this process has been sent

    def take(self, number: int) -> bool:
        """The first signal lets the step end; on a second the process ends."""
        first, self.seen = not self.seen, number
        return first

    def asked(self) -> bool:
        """Whether to stop. All processes ask at the same point."""
        self.signal = largest(self.seen)
        return bool(self.signal)


class Run(NamedTuple):
    """What stays the same all through a run."""

    folder: Path
    settings: Settings
    corpus: Corpus
    config: Config
    recipe: Recipe
    keeper: Keeper
    stop: Stop
    book: Journal
    rows: NamedSharding | None  # of a batch over several devices


def train(args: argparse.Namespace) -> int:
    """Begin a run, or resume one. The exit status is 128 + n if signal n ended it early."""
    if several() and PARENT not in os.environ:
        return watched(again(sys.argv[1:]), [{}], math.inf)  # a parent for this process
    folder, stop = Path(args.out), Stop()
    settings = settle(args, {} if args.resume is None else read_fields(folder / RUN)["options"])
    at = chosen_step(folder, args.resume)
    if settings.checkpoints == "orbax" or (at is not None and is_orbax(of_step(folder, at))):
        extra("orbax.checkpoint", "scale")
    with ExitStack() as stack:
        stack.enter_context(ending(stop.take))
        stack.enter_context(joined(args.debug))
        writes = index() == 0
        if writes:
            stack.enter_context(held(folder))
        if writes and args.resume is None:
            check_new(folder)
        agree_on(lambda: {"code": code(), **{name: v for name, v in settings._asdict().items() if name not in PATHS}})
        mesh = mesh_of(settings)
        corpus, config, learner, kept, marks = started(folder, settings, mesh, at, args.allow)
        weights = partial(base_digest, settings.init_from) if kept is None else lambda: kept.seal
        agree_on(lambda: {**marks, "weights": weights(), "out": holder(folder, settings), "versions": ""})
        if mesh:
            check_seq(corpus.train.seq, mesh.shape)
            stack.enter_context(jax.set_mesh(mesh))
        learner = restored(kept, learner, config, mesh) if kept else learner
        state, rows = kept.state if kept else State(), batch_sharding(mesh) if mesh else None
        options = {"options": settings._asdict(), "config": asdict(config), "fingerprints": marks}
        if writes:
            write_json(folder / RUN, {**options, "versions": versions()})
        book = stack.enter_context(journal(folder, state, settings.steps) if writes else nullcontext(Quiet()))
        recipe, form = recipe_of(settings, config), cast(str, settings.checkpoints)
        tokenizer = corpus.tokenizer and fit(corpus.tokenizer, config.vocab, "tokenizer")
        keeper = stack.enter_context(Keeper(folder, form, config, tokenizer, recipe.scale, marks, settings.keep))
        run = Run(folder, settings, corpus, config, recipe, keeper, stop, book, rows)
        if at is None:
            keeper.save(learner, state)
            keeper.wait()  # which shows that it can be done
        return finish(run, course(run, learner, state))


def chosen_step(folder: Path, resume: str | None) -> int | None:
    """The step of the checkpoint to resume from: the one asked for, else the last; None where there is none."""
    if resume is None:
        return None
    found = steps(folder)
    names: dict[str, int | None] = {"": found[-1] if found else None, **{f"step-{n}": n for n in found}}
    said = ", ".join(f"step-{n}" for n in found) or "no step, as there is no checkpoint"
    check("resume", repr(resume), resume in names, f"{said}; DATA stand before --resume", folder)
    return names[resume]


def holder(folder: Path, settings: Settings) -> str | None:
    """What tells a folder that all processes see from others: who holds it. Otherwise process 0 alone sees it."""
    if settings.checkpoints == "hf":
        return None
    return (folder / LOCK).read_text() if (folder / LOCK).exists() else "another folder"


def check_new(folder: Path) -> None:
    """Refuse a folder that holds anything but data which an earlier start has prepared."""
    there = sorted(path.name for path in folder.iterdir() if path.name not in (DATA, ".lock"))
    check("path", f"a folder with {', '.join(there[:3])}", not there, "a new one, or --resume", folder)


# ---- What a run starts from ------------------------------------------------------------------------------------------


def started(
    folder: Path, settings: Settings, mesh: Mesh | None, at: int | None, allowed: Sequence[str]
) -> tuple[Corpus, Config, Learner, Kept | None, dict[str, Any]]:
    """The data, the learner, new or its shapes beside a checkpoint, and what a resume will have to agree with."""
    kept = None if at is None else read_back(folder, at)
    corpus, config, learner = prepared(folder, settings, mesh, kept is not None)
    base = {"base": base_digest(settings.init_from)} if settings.lora else {}  # what adapters belong to
    marks = fingerprints(settings, config, {**corpus.fingerprints, **base})
    if kept:
        agree(kept, marks, allowed, lambda text: print(f"note: {text}", file=sys.stderr))
    return corpus, config, learner, kept, marks


def prepared(folder: Path, settings: Settings, mesh: Mesh | None, shapes_alone: bool) -> tuple[Corpus, Config, Learner]:
    """The data, and a learner before its first step, made where it is to lie; or the shapes of a model to train."""
    base = load(settings.init_from, "float32", mesh) if settings.init_from else None
    named = settings.tokenizer
    if named and named not in ("chars", "bpe"):  # which are yet to be learned
        tokenizer = load_tokenizer(named)
    else:
        tokenizer = named or (base.tokenizer if base else None)
    if base and tokenizer and not isinstance(tokenizer, str):
        tokenizer = fit(tokenizer, base.config.vocab, named or settings.init_from)
    with in_turn("data"):
        corpus = prepare(
            settings.data, folder / DATA, tokenizer=tokenizer, vocab=settings.vocab,
            seq=row_length(settings, base.config if base else None), fraction=settings.val_fraction, pack=settings.pack,
        )  # fmt: skip
    config = base.config if base else new_config(settings, corpus.vocab)
    check("vocab", corpus.vocab, corpus.vocab <= config.vocab, f"at most {config.vocab}, the model's", "data")
    check("lora", settings.lora, (settings.lora or 1) <= config.dim, f"at most the width, {config.dim}")
    check_memory(16 * share(config, mesh), "config")  # parameters, gradients, and two moments

    def begin(rng: Key[Array, ""], base: Params | None) -> Learner:
        params = stacked(base) if base else None
        if params is None or not settings.lora:
            return beginner(None, params or new_params(rng, config, (settings.init_std or STD) / STD))
        names = settings.lora_targets.split(",")
        return beginner(params, new_adapters(rng, cast(Any, params.blocks), settings.lora, names))

    given = jax.random.key(settings.seed), base.params if base else None
    shapes = jax.eval_shape(begin, *given)
    if shapes_alone and not settings.lora:
        return corpus, config, shapes
    begin = jax.jit(begin, out_shardings=places(shapes, config, mesh)) if mesh else begin
    return corpus, config, begin(*given)


def base_digest(path: str | None) -> str:
    """The SHA-256 of the parameters that a run begins with, if it begins with a checkpoint's."""
    if path is None:
        return ""
    with checkpoint(path) as found:
        return found.digest()


# ---- The course of a run ---------------------------------------------------------------------------------------------


def course(run: Run, learner: Learner, state: State) -> State:
    """Step after step, up to the last, to a signal, or to where patience ends."""
    s = run.settings
    if state.owed and not over(run, state):
        state = evaluated(run, learner, state, run.book.owed)
        run.keeper.save(learner, state)
    own = own_rows(run.rows, s.batch, run.corpus.train.seq) if run.rows else range(s.batch)
    batches = ahead(lambda n: run.corpus.train.batch(s.seed, n, s.batch, own), range(state.step, s.steps))
    for batch in () if over(run, state) else batches:
        learner, state, row = advanced(run, learner, state, rows_of(run, batch, own))
        last = state.step == s.steps
        if last or state.step % cast(int, s.eval_every) == 0:
            state = evaluated(run, learner, state, row)
        else:
            run.book.step(row)
        due = state.best_step == state.step or state.step % cast(int, s.save_every) == 0
        if due:
            run.keeper.save(learner, state)
        if over(run, state):
            if not due:
                run.keeper.save(learner, state)
            break
    run.keeper.wait()
    return state


def over(run: Run, state: State) -> bool:
    """Whether a run is to end here."""
    patience = run.settings.patience
    tired = patience is not None and state.stale >= patience
    return run.stop.asked() or tired or (state.step >= run.settings.steps and not state.owed)


def advanced(run: Run, learner: Learner, state: State, rows: tuple[Any, ...]) -> tuple[Learner, State, dict[str, Any]]:
    """One step on: the learner, the state and the line for metrics.jsonl."""
    s, began = run.settings, time.perf_counter()
    rate = learning_rate(state.step, s.lr, cast(int, s.warmup), s.steps, cast(float, s.final_lr))
    trained, moments, report = step(
        learner.base, learner.trained, learner.moments, cast(Any, np.float32(rate)), rows, run.recipe
    )
    loss, norm, good = float(report.loss), float(report.norm), bool(report.good)
    took = time.perf_counter() - began
    state = state._replace(
        step=state.step + 1, updates=state.updates + good, skipped=state.skipped + (not good),
        row=0 if good else state.row + 1,
    )  # fmt: skip
    if not good:
        run.book.line(f"step {state.step}: skipped, as the loss is {loss} and the gradient's norm {norm}")
    if state.row == ROW:
        run.keeper.wait()
        last = of_step(run.folder, steps(run.folder)[-1])
        raise FloatingPointError(
            f"{run.folder}: loss: got {loss} in {ROW} steps in a row, expected numbers; see {last}"
        )
    row = {"step": state.step, "train_loss": loss, "lr": rate, "grad_norm": norm}
    return Learner(learner.base, trained, moments), state, {**row, "tokens_per_s": rows[0].size / took}


def rows_of(run: Run, batch: Batch, own: Sequence[int]) -> tuple[Any, ...]:
    """The arrays of a batch, of which this process has its own rows."""
    arrays = [ids for ids in batch if ids is not None]
    return tuple(spread(ids, own, run.settings.batch, run.rows) if run.rows else ids for ids in arrays)


def evaluated(run: Run, learner: Learner, state: State, row: dict[str, Any]) -> State:
    """The state after an evaluation; if a signal comes before its end, that is owed to whoever resumes."""
    split = run.corpus.validation
    loss = validation_loss(run, learner, split) if split else None
    if run.stop.signal and split:
        run.book.step(row)
        return state._replace(owed=True)
    state = state._replace(owed=False)
    if loss is not None:
        better = state.best is None or loss < state.best
        best = {"best": loss, "best_step": state.step, "stale": 0} if better else {"stale": state.stale + 1}
        state, row = state._replace(**best), {**row, "val_loss": loss}
    run.book.step(row)
    if run.settings.sample:
        params = gathered(merged(learner.base, learner.trained, run.recipe.scale))
        if index() == 0:
            run.book.sample(state.step, sample(run, params))
    run.book.draw()
    return state


def validation_loss(run: Run, learner: Learner, split: Split) -> float:
    """The mean loss over the validation data, or over as many batches as are asked for."""
    total, targets = 0.0, 0
    for batch in split.sweep(run.settings.batch, run.settings.eval_batches):
        if run.stop.asked():
            break
        n = int((batch.targets >= 0).sum())
        loss = batch_loss(learner.base, learner.trained, rows_of(run, batch, range(run.settings.batch)), run.recipe)
        total, targets = total + n * float(loss), targets + n
    return total / max(targets, 1)


def sample(run: Run, params: Params) -> str:
    """A text of the model's: after BOS, or a newline, or token 0."""
    tokenizer = run.keeper.tokenizer
    model = Model(run.config, jax.device_put(in_tuple(params)), tokenizer)
    start = tokenizer.begin("") if tokenizer else []
    newlines = [i for i, piece in enumerate(tokenizer.pieces) if piece == b"\n"] if tokenizer else []
    room = min(run.settings.sample, run.config.ctx - 1)
    parts = list[str]()
    with jax.set_mesh(None):  # of several processes one alone writes it, which cannot use the devices of others
        for part in generate(model, start or newlines[:1] or [0], room, seed=run.settings.seed):
            parts.append(part if isinstance(part, str) else f"{part} ")
            if run.stop.seen:
                break
    return "".join(parts)


def finish(run: Run, state: State) -> int:
    """Say how it ended: where it was interrupted on stderr, else the result on stdout."""
    skipped = f", {state.skipped} skipped" if state.skipped else ""
    if run.stop.signal and (state.step < run.settings.steps or state.owed):
        where = of_step(run.folder, state.step)
        run.book.line(f"interrupted after {state.step} steps{skipped}; {where} is saved, --resume goes on")
        return 128 + run.stop.signal
    run.book.line(f"{state.step} steps{skipped}")
    if index():
        return 0
    if state.best is None:
        print(of_step(run.folder, state.step))
    else:
        print(f"{run.folder / BEST}: validation loss {state.best:.4f} after {state.best_step} steps")
    return 0
