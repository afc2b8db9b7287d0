"""Cases H, but for H9 (faults_data.py): training runs and their checkpoints."""

import contextlib
import functools
import importlib
import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from asserts import QUICK
from builders import TINY, random_params
from faults import USAGE, Accepted, Act, Case, Done, Unlike, Variant, World, ends, guarded, refused
from jax import numpy as jnp
from small_runs import assert_same, hasten, rows, words

from lovely_llama import LlamaError
from lovely_llama_tools.commands import arguments, train
from lovely_llama_tools.data.prepare import prepare
from lovely_llama_tools.formats.files import load
from lovely_llama_tools.formats.hugging_face import WEIGHTS
from lovely_llama_tools.interrupts import taken
from lovely_llama_tools.training import loop, run_folder, settings
from lovely_llama_tools.training import step as training_step
from lovely_llama_tools.training.checkpoints import Checkpointer, restore
from lovely_llama_tools.training.run_folder import (
    OPTIMIZER,
    STATE,
    Progress,
    is_good,
    locked,
    read_checkpoint,
    save_checkpoint,
    steps,
    write_hf,
)
from lovely_llama_tools.training.step import TrainState, initial_state, stacked

COMMAND = "lovely-llama train"
SIZES = "--layers 1 --heads 2 --dim 4 --hidden-dim 6 --ctx 4 --batch 2 --vocab 11 --sample 0"
SCHEDULE = "--steps 6 --eval-every 3 --save-every 2 --warmup 1 --keep 9"
STATE_0 = initial_state(None, stacked(random_params(TINY)))
FINGERPRINTS: dict[str, Any] = {"lr": 0.1}
IN_PLACE = {".training.run_folder:replacing": "lambda target: __import__('contextlib').nullcontext(target)"}


class Killed(BaseException):
    """The process ends here."""


def save(
    run: Path, step: int, last: int = 9, form: str = "hf", state: TrainState = STATE_0, **more: Any
) -> Path:  # fmt: skip
    """A checkpoint without any training."""
    run.mkdir(exist_ok=True)
    with Checkpointer(run, form, TINY, None, 1.0, FINGERPRINTS, last) as checkpointer:
        checkpointer.save(state, Progress(step, **more))
        checkpointer.wait()
    return run / f"step-{step}"


def parts(run: Path, step: int) -> object:
    """All that is in a checkpoint."""
    saved = read_checkpoint(run, step)
    return saved.model, restore(saved, STATE_0, TINY, None)


def data(world: World, seed: int = 0) -> Path:
    """Tokens to train on."""
    path = world.folder / "tokens.npy"
    np.save(path, np.random.default_rng(seed).integers(0, 11, 200).astype(np.uint16))
    return path


def run(world: World, *arguments: object, out: str = "run") -> Done:
    """The command `train`, with programs that compile fast."""
    hasten(world.patch)
    return world.main(*words("--out", world.folder / out, *arguments))


def whole(world: World) -> Path:
    """A run that nothing interrupts."""
    assert run(world, data(world), SIZES, SCHEDULE, out="whole").status == 0
    return world.folder / "whole"


def trains(world: World) -> None:
    whole(world)
    assert len(rows(world.folder / "whole")) == 6
    assert load(world.folder / "whole" / "best").config.dim == 4


def strike(world: World, place: str, at: int, blow: Callable[[], object]) -> None:
    """Let a blow fall as a function is called for the nth time."""
    module, _, name = place.partition(":")
    target = importlib.import_module(module, "lovely_llama_tools")
    original, calls = operator.attrgetter(name)(target), list[int]()

    def struck(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            blow()
        return original(*arguments, **more)

    *owners, last = name.split(".")
    owner = operator.attrgetter(".".join(owners))(target) if owners else target
    world.patch.setattr(owner, last, struck)


def kill() -> None:
    raise Killed


def full() -> None:
    raise OSError(28, "No space left on device")


# ---- H1: killed while saving -----------------------------------------------------------------------------------------


def killed_while(
    place: str, form: str = "hf", removed: Mapping[str, str] = IN_PLACE, end: type[BaseException] = AssertionError
) -> Variant:
    """After a kill in this place the last checkpoint loads, and the next start finds a clean folder."""

    def act(world: World) -> None:
        folder = world.folder / "run"
        save(folder, 1, form=form)
        with world.patch.context() as patch:
            inner = replace(world, patch=patch)
            strike(inner, place, 1, kill)
            with contextlib.suppress(Killed):
                save(folder, 2, 1, form, best=1.0, best_step=2)
        assert all(is_good(folder / f"step-{n}") for n in steps(folder)) and steps(folder)
        with locked(folder):
            left = {path.name for path in folder.iterdir()} - {"step-1", "step-2", "best", ".lock"}
        assert not left
        save(folder, 2, 1, form, best=1.0, best_step=2)
        assert steps(folder) == [2] and load(folder / "best").config == TINY

    return guarded(act, removed, end)


def half_deleted(world: World) -> None:
    """A kill while an old checkpoint is deleted."""
    folder = world.folder / "run"
    shutil.copytree(save(folder, 1), folder / "step-0")

    def begin(path: Path, **_: object) -> None:
        (path / "model.safetensors").unlink()
        raise Killed

    with world.patch.context() as patch:
        patch.setattr(shutil, "rmtree", begin)
        with contextlib.suppress(Killed):
            run_folder.prune(folder, Progress(1), 1)
    assert all(is_good(folder / f"step-{n}") for n in steps(folder))


DELETED_IN_PLACE = {
    ".training.run_folder:prune": "lambda run, *_: [shutil.rmtree(step_path(run, n)) for n in steps(run)[:-1]]"
}


def cleaned(world: World) -> None:
    part = world.folder / "run" / ".step-3.part" / "step-3"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    with locked(world.folder / "run"):
        assert not part.parent.exists()


# ---- H2: disks that fail ---------------------------------------------------------------------------------------------


def failing(place: str, at: int, step: int, form: str = "hf") -> Variant:
    """The command ends in one line and status 1; what was saved before still loads."""

    def act(world: World) -> None:
        strike(world, place, at, full)
        done = run(world, data(world), SIZES, SCHEDULE, "--checkpoints", form)
        last = done.err.splitlines()[-1]
        if not re.fullmatch(r"error: [^\n]+: path: got No space left on device, expected [^\n]+", last):
            raise Unlike(done.err)
        assert done.status == 1 and "Traceback" not in done.err and not done.out
        assert steps(world.folder / "run")[-1:] == ([step] if step >= 0 else [])
        assert all(is_good(world.folder / "run" / f"step-{n}") for n in steps(world.folder / "run"))
        assert not [*(world.folder / "run").glob(".*.part")]

    return guarded(act, IN_PLACE, Unlike)


def unwritable(where: str) -> Variant:
    """Where no folder can be made or written to, nothing begins."""

    def act(world: World) -> Done:
        (world.folder / "file").write_text("")
        (world.folder / "loop").symlink_to("loop")
        return run(world, data(world), SIZES, SCHEDULE, out=where)

    return ends(act, 2, "path", removed={".training.run_folder:locked": UNHELD}, end=Unlike)


UNHELD = "lambda run: __import__('contextlib').nullcontext()"
LATE = {
    ".training.checkpoints:Checkpointer.save": "lambda self, state, progress: original(self, state, progress) "
    "if progress.step else None"
}


def before_the_first_step(world: World) -> None:
    """That a checkpoint cannot be written is seen before anything is learned."""
    strike(world, ".training.run_folder:write_safetensors", 1, full)
    assert run(world, data(world), SIZES, SCHEDULE).status == 1
    assert not rows(world.folder / "run")


# ---- H3: signals -----------------------------------------------------------------------------------------------------

DEAF = {".training.loop:Stop.take": "lambda self, number: False"}


def signalled(name: str, at: int, number: int, owed: bool = False) -> Variant:
    """The step is finished and saved, and the exit status is 128 + the signal's number; nothing is lost."""

    def act(world: World) -> None:
        want = whole(world)
        with world.patch.context() as patch:
            inner = replace(world, patch=patch)
            hasten(patch)
            strike(inner, f".training.loop:{name}", at, lambda: taken(number))
            done = world.main(*words("--out", world.folder / "run", data(world), SIZES, SCHEDULE))
        last = steps(world.folder / "run")[-1]
        assert (done.status, done.out) == (128 + number, "")
        assert read_checkpoint(world.folder / "run", last).progress.owed == owed
        assert run(world, "--resume").status == 0
        assert_same(world.folder / "run", want)

    return guarded(act, DEAF)


def twice(world: World) -> None:
    """A second signal is left to the process, which ends."""
    seen = list[bool]()
    hasten(world.patch)
    strike(world, ".training.loop:step", 2, lambda: seen.extend([taken(15), taken(15)]))
    run_status = world.main(*words("--out", world.folder / "run", data(world), SIZES, SCHEDULE)).status
    assert seen == [True, False] and run_status == 143


# ---- H4: resumed, bit for bit ----------------------------------------------------------------------------------------


def documents(world: World) -> Path:
    """Short ones: an epoch has fewer rows than two steps."""
    path = world.folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": "abcd"[: n % 3 + 2]}) + "\n" for n in range(6)))
    return path


def resumed(removed: Mapping[str, str], *options: object) -> Variant:
    """Killed after step 6, and resumed from step 4, it ends with the bits and the lines of an unbroken run."""

    def act(world: World) -> None:
        schedule = [data(world), SIZES, SCHEDULE, *options]
        if "--pack" in options:
            schedule = [documents(world), SIZES.replace("--vocab 11", ""), SCHEDULE, *options]
        assert run(world, *schedule, out="whole").status == 0
        with world.patch.context() as patch:
            inner = replace(world, patch=patch)
            hasten(patch)
            strike(inner, ".training.loop:evaluate", 2, kill)
            with contextlib.suppress(Killed):
                world.main(*words("--out", world.folder / "run", *schedule))
        assert steps(world.folder / "run")[-1] == 4
        assert run(world, "--resume").status == 0
        assert_same(world.folder / "run", world.folder / "whole")

    return guarded(act, removed)


def forgetting(field: str) -> dict[str, str]:
    """Lose a part of the progress."""
    lost = f"lambda *a: (saved := original(*a))._replace(progress=saved.progress._replace({field}=Progress().{field}))"
    return {".training.loop:read_checkpoint": lost}


REPLAYED = {".training.loop:ahead": "lambda batches, steps: original(batches, range(len(steps)))"}
NO_MOMENTS = {
    ".training.checkpoints:from_stored": "lambda state, params, arrays, *more: "
    "original(state, params, {name: 0 * array for name, array in arrays.items()}, *more)"
}
RATES_RESTART = {
    ".training.loop:learning_rate": "lambda step, *more, n=__import__('itertools').count(): "
    "original(next(n) % 6, *more)"
}
UNCUT = {".training.metrics:cut_rows": "lambda path, step: []"}


# ---- H5: resumed, with something else --------------------------------------------------------------------------------


def changed(field: str, option: object, removed: Mapping[str, str] | None = None, end: Any = Accepted) -> Variant:
    """Refused, by name."""

    def act(world: World) -> Done:
        assert run(world, data(world), SIZES, SCHEDULE).status == 0
        path = data(world, seed=1) if field == "data" else ""
        return run(world, path, "--resume", option)

    return ends(act, 2, field, removed=removed, end=end)


def another_text(world: World) -> Done:
    text = world.folder / "text.txt"
    text.write_text("abcdefghijk" * 9)
    assert run(world, text, SIZES.replace("--vocab 11", ""), SCHEDULE).status == 0
    text.write_text("kjihgfedcba" * 9)
    return run(world, "--resume")


def another_tokenizer(world: World) -> Done:
    text = world.folder / "text.txt"
    text.write_text("abcdefghijk" * 9)
    assert run(world, text, SIZES.replace("--vocab 11", ""), SCHEDULE).status == 0
    return run(world, "--resume", "--tokenizer", world.talker)


def allowed(world: World) -> None:
    """What is changed on purpose."""
    assert run(world, data(world), SIZES, SCHEDULE).status == 0
    assert run(world, "--resume", "--lr 1e-2 --steps 8 --allow lr --allow steps").status == 0
    assert len(rows(world.folder / "run")) == 8


# ---- H6: checkpoints that have been damaged --------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def damaged(
    name: str, damage: Callable[[Path], object], field: str = "sha256", end: Any = Accepted,
    removed: Mapping[str, str] | None = None, form: str = "hf",
) -> Variant:  # fmt: skip
    """Refused; the line names the last good one, with which the run goes on."""

    def act(world: World) -> object:
        folder = world.folder / "run"
        if not folder.exists():
            for step in (1, 2):
                save(folder, step)
            flip(save(folder, 3) / "model.safetensors")
            save(folder, 4, form=form)
            largest = sorted((folder / "step-4").glob(name), key=lambda path: path.stat().st_size)
            damage((largest or [folder / "step-4" / name])[-1])
        return parts(folder, 4)

    return refused(act, field, "--resume step-2 goes back to the last good one", removed, end)


UNVERIFIED = {".training.run_folder:verify": "lambda path, *_: read_fields(path / STATE)"}
PLAIN_JSON = {".training.run_folder:read_fields": "lambda path: __import__('json').loads(path.read_bytes())"}


def foreign(path: Path) -> None:
    shutil.copy(path.parents[1] / "step-1" / path.name, path)
    flip(path)


def edited(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(re.sub(old, new, path.read_text()))


def goes_back(world: World) -> None:
    folder = world.folder / "run"
    assert run(world, data(world), SIZES, SCHEDULE).status == 0
    flip(folder / "step-6" / "optimizer.safetensors")
    done = run(world, "--resume")
    assert done.status == 2 and "--resume step-4" in done.err
    assert run(world, "--resume step-4").status == 0
    assert is_good(folder / "step-6")


# ---- H7: two processes -----------------------------------------------------------------------------------------------

UNLOCKED = {".training.run_folder:fcntl": "type('Free', (), {'LOCK_EX': 2, 'LOCK_NB': 4, 'flock': lambda *_: 0})"}


def second(*arguments: object) -> Variant:
    """The folder is locked, as by another process."""

    def act(world: World) -> Done:
        if arguments:
            run(world, data(world), SIZES, SCHEDULE)
        with locked(world.folder / "run"):
            return run(world, *(arguments or (data(world), SIZES, SCHEDULE)))

    return ends(act, 2, "lock", str(os.getpid()), removed=UNLOCKED)


# ---- H8: what is not finite ------------------------------------------------------------------------------------------

TRUSTING = {
    ".training.step:jnp": "type('Bare', (), {'__getattr__': lambda _, name: (lambda x: original.bool_(True)) "
    "if name == 'isfinite' else getattr(original, name)})()"
}


def fresh(program: Any, **options: Any) -> Any:
    """A program that shares no trace with others of the same function."""

    @functools.wraps(program.__wrapped__)
    def same(*arguments: Any, **more: Any) -> Any:
        return program.__wrapped__(*arguments, **more)

    return jax.jit(same, compiler_options=QUICK, **options)


def poison(world: World, bad: tuple[int, ...], value: float) -> None:
    """Let the loss of these steps be something else than a number."""
    corpus = prepare(
        [str(data(world))], world.folder, tokenizer=None, vocab=11, seq=4, fraction=0.1, pack=False
    )  # fmt: skip
    batches = jnp.stack([jnp.array(corpus.train.batch(0, step, 2).tokens) for step in bad])
    loss = training_step.loss
    world.patch.setattr(
        training_step,
        "loss",
        lambda p, t, *more, **options: (
            loss(p, t, *more, **options) * jnp.where((t[None] == batches).all((1, 2)).any(), value, 1.0)
        ),
    )
    hasten(world.patch)
    both = ("trained", "moments")
    world.patch.setattr(loop, "step", fresh(training_step.step, static_argnames="options", donate_argnames=both))


def skipped(value: float) -> Variant:
    """One such step is left out, counted and printed; the others are learned from."""

    def act(world: World) -> None:
        poison(world, (1, 3), value)
        schedule = SCHEDULE.replace("--eval-every 3", "--eval-every 6") + " --val-fraction 0.1"
        done = world.main(*words("--out", world.folder / "run", data(world), SIZES, schedule))
        assert done.status == 0, done.err
        saved = read_checkpoint(world.folder / "run", 6)
        assert (saved.progress.skipped, saved.progress.updates, saved.progress.row) == (2, 4, 0)
        assert len(re.findall("^step [24]: skipped", done.err, re.MULTILINE)) == 2
        assert [row["train_loss"] is None for row in rows(world.folder / "run")] == [
            step in (1, 3) for step in range(6)
        ]

    return guarded(act, TRUSTING)


def three_in_a_row(world: World) -> Done:
    poison(world, (2, 3, 4), float("nan"))
    done = world.main(*words("--out", world.folder / "run", data(world), SIZES, SCHEDULE))
    assert done.status == 0 or steps(world.folder / "run")[-1] == 4
    return done._replace(err=done.err[done.err.index("error: ") :]) if "error: " in done.err else done


def no_number(world: World) -> Done:
    """The first evaluation, after a step that was too large."""
    done = run(world, data(world), SIZES, "--steps 1 --warmup 0 --lr 1e10")
    return done._replace(err=done.err[done.err.index("error: ") :]) if "error: " in done.err else done


ANY_LOSS = {".training.loop:math": "type('Lenient', (), {'isfinite': lambda x: True})"}


def never_saved(what: str, form: str, end: type[BaseException] = Accepted) -> Variant:
    """Parameters or moments that are not finite."""

    def act(world: World) -> None:
        save(world.folder / "run", 1, form=form)
        first, params = STATE_0.moments.first, STATE_0.trained
        if what == "params":
            state = STATE_0._replace(trained=params._replace(norm=params.norm.at[3].set(jnp.nan)))
        else:
            bad = first._replace(embed=first.embed.at[1, 2].set(jnp.inf))
            state = STATE_0._replace(moments=STATE_0.moments._replace(first=bad))
        try:
            save(world.folder / "run", 2, 1, form, state)
        except FloatingPointError as error:
            assert re.fullmatch(rf"[^\n]+step-2: {what}\.\w+: got NaN or ∞, expected finite numbers", str(error))
        else:
            raise Accepted
        assert steps(world.folder / "run") == [1]

    return guarded(act, {".training.checkpoints:check_finite": "lambda *_: None"}, end)


# ---- H10: nonsense numbers -------------------------------------------------------------------------------------------


def told(field: str, options: str, end: type[BaseException] = Accepted) -> dict[str, Variant]:
    """These options are refused, for this field, before anything is read or made."""

    def act(_: World) -> object:
        s = settings.settle(train.given(arguments().parse_args(words(options))), {})
        return settings.new_config(s, 11), settings.row_length(s, None)

    return {options: refused(act, field, end=end)}


def text_of(options: str) -> dict[str, Variant]:
    """What is no number at all; argparse alone would print its usage."""
    return {options: ends(lambda world: run(world, options), 2, COMMAND, removed=USAGE, end=SystemExit)}


# ---- H11, H12: order, modes and links --------------------------------------------------------------------------------


def in_order(clock: Callable[[int], float]) -> Act:
    """The last two stay: the tenth after the ninth, whatever the clock says."""

    def act(world: World) -> None:
        folder = world.folder / "run"
        for step in (8, 9, 10, 11):
            path = save(folder, step, 2)
            os.utime(path, (clock(step), clock(step)))
        assert steps(folder) == [10, 11]
        assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-11"]

    return act


BY_NAME = {".training.run_folder:steps": "lambda run: [int(p.name[5:]) for p in sorted(run.glob('step-*'))]"}
BY_TIME = {
    ".training.run_folder:steps": "lambda run: [int(p.name[5:]) for p in sorted(run.glob('step-*'), "
    "key=lambda p: p.stat().st_mtime)]"
}


def new_before_old(world: World) -> None:
    """Where the new one cannot be written, none is deleted."""
    save(world.folder / "run", 1)
    strike(world, ".training.run_folder:publish", 1, full)
    with contextlib.suppress(OSError):
        save(world.folder / "run", 2, 1)
    assert steps(world.folder / "run") == [1]


def best_stays(world: World) -> None:
    folder = world.folder / "run"
    for step in (1, 2, 3):
        save(folder, step, 1, best=1.0, best_step=1)
    assert steps(folder) == [1, 3] and load(folder / "best").config == TINY


def modes(world: World) -> None:
    before = os.umask(0o027)
    try:
        path = save(world.folder / "run", 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def linked(world: World) -> None:
    (world.folder / "elsewhere").mkdir()
    (world.folder / "run").symlink_to("elsewhere")
    assert run(world, data(world), SIZES, SCHEDULE).status == 0
    assert (world.folder / "run").is_symlink() and is_good(world.folder / "elsewhere" / "step-6")
    assert run(world, "--resume").status == 0


def moved(world: World) -> None:
    save(world.folder / "run", 1, best=1.0, best_step=1)
    (world.folder / "run").rename(world.folder / "moved")
    assert load(world.folder / "moved" / "best").config == TINY


def over_itself(world: World) -> None:
    """A checkpoint is saved over the one that its parameters were loaded from."""
    path = save(world.folder / "run", 1)
    loaded = load(path)
    save_checkpoint(world.folder / "run", partial(write_hf, loaded, {}), Progress(1), FINGERPRINTS, 1)
    np.testing.assert_array_equal(load(path).params.embed, STATE_0.trained.embed)


PRIVATE = {".training.run_folder:publish": "lambda new, target: (os.chmod(new, 0o700), original(new, target))"}
ABSOLUTE = {
    ".training.run_folder:link_best": "lambda run, step: (run / BEST).symlink_to(step_path(run, step).absolute())"
}
MADE = {".training.run_folder:locked": "lambda run: run.mkdir() or __import__('contextlib').nullcontext()"}
EAGER = {
    ".training.run_folder:replacing": "lambda path: ([shutil.rmtree(step_path(path.parent, n)) "
    "for n in steps(path.parent)], original(path))[1]"
}
ONLY_LAST = {
    ".training.run_folder:prune": "lambda run, s, last: [shutil.rmtree(step_path(run, n)) for n in steps(run)[:-last]]"
}

# ---- The cases -------------------------------------------------------------------------------------------------------

SAFETENSORS = ".formats.hugging_face:write_safetensors"
DESCRIPTION = ".training.checkpoints:save_description"
MOMENTS, SEAL, PUBLISH, SYNC = (
    ".training.run_folder:write_safetensors", ".training.run_folder:checksum", ".training.run_folder:publish",
    "os:fsync",
)  # fmt: skip

CASES: dict[str, Case] = {
    "H1": Case(
        "S", "kill -9 at any point of a save",
        {
            "parameters": killed_while(SAFETENSORS),
            "moments": killed_while(MOMENTS),
            "progress": killed_while(SEAL),
            "by orbax": killed_while(SEAL, "orbax"),
            "deleting": guarded(half_deleted, DELETED_IN_PLACE),
            "cleaned": guarded(cleaned, {".training.run_folder:remove": "lambda path: None"}),
        },
        trains,
    ),
    "H2": Case(
        "S", "full and failing disks, folders that cannot be written to",
        {
            "parameters": failing(SAFETENSORS, 2, 0), "moments": failing(MOMENTS, 3, 2), "fsync": failing(SYNC, 12, 0),
            "rename": failing(PUBLISH, 4, 2),
            "by orbax": failing(DESCRIPTION, 3, 2, "orbax"), "fsync, by orbax": failing(SYNC, 30, 0, "orbax"),
            "below a file": unwritable("file/run"), "a file": unwritable("file"),
            "a link to itself": unwritable("loop"), "/proc": unwritable("/proc/run"),
            "the first": guarded(before_the_first_step, LATE),
        },
        trains,
    ),
    "H3": Case(
        "S", "Ctrl-C and SIGTERM",
        {
            "compiling": signalled("step", 1, 2), "in a step": signalled("step", 3, 15, owed=True),
            "in an evaluation": signalled("batch_loss", 1, 2, owed=True),
            "saving": signalled("Checkpointer.save", 2, 15),
            "twice": guarded(
                twice, {".training.loop:Stop.take": "lambda self, n: setattr(self, 'seen', n) is None"}
            ),
        },
        trains,
    ),
    "H4": Case(
        "S", "a resumed run is the unbroken one, bit for bit",
        {
            "data": resumed(REPLAYED), "moments": resumed(NO_MOMENTS), "rate": resumed(RATES_RESTART),
            "best": resumed(forgetting("best"), "--lr 0.05 --warmup 0"), "updates": resumed(forgetting("updates")),
            "lines": resumed(UNCUT),
            "an epoch's edge": resumed(REPLAYED, "--pack"),
        },
        trains,
    ),
    "H5": Case(
        "S", "a run resumed with something else",
        {
            "lr": changed("lr", "--lr 1e-2"), "steps": changed("steps", "--steps 8"),
            "seed": changed("seed", "--seed 1"),
            "weight decay": changed("weight_decay", "--weight-decay 0"), "clip": changed("clip", "--clip 2"),
            "beta1": changed("beta1", "--beta1 0.8"), "beta2": changed("beta2", "--beta2 0.9"),
            "dtype": changed("dtype", "--dtype bfloat16"), "batch": changed("batch", "--batch 4"),
            "warmup": changed("warmup", "--warmup 0"), "remat": changed("remat", "--remat nothing"),
            "split": changed("val_fraction", "--val-fraction 0.3"),
            "dim": changed("config.dim", "--dim 8", end=Unlike),
            "layers": changed("config.layers", "--layers 2", end=Unlike),
            "theta": changed("config.theta", "--theta 5"), "tied": changed("config.tied", "--no-tied", end=Unlike),
            "data": changed("data", ""),
            "a text": ends(another_text, 2, "sources"),
            "a tokenizer": ends(another_tokenizer, 2, "encoded", end=Unlike),
        },
        allowed,
    ),
    "H6": Case(
        "S", "damaged checkpoints",
        {
            "a bit of a parameter": damaged(WEIGHTS, flip), "a bit of a moment": damaged(OPTIMIZER, flip),
            "a shorter model": damaged(WEIGHTS, cut, end=Unlike),
            "shorter moments": damaged(OPTIMIZER, cut, end=Unlike),
            "no moments": damaged(OPTIMIZER, Path.unlink, "path", AssertionError, UNVERIFIED),
            "no model": damaged(WEIGHTS, Path.unlink, "path", AssertionError, UNVERIFIED),
            "other moments": damaged(OPTIMIZER, foreign),
            "another step": damaged(STATE, edited('"step": 4', '"step": 7')),
            "no checksum": damaged(STATE, edited('"sha256": "[^"]*"', '"x": 1')),
            "no progress": damaged(STATE, Path.unlink, "path", FileNotFoundError, PLAIN_JSON),
            "by orbax": damaged("orbax/ocdbt.process_0/d/*", flip, form="orbax"),
            "shorter, by orbax": damaged("orbax/ocdbt.process_0/d/*", cut, form="orbax"),
            "a foreign file": damaged("tokenizer.json", lambda p: p.write_text("{}"), "path", Unlike),
        },
        goes_back,
    ),
    "H7": Case("S", "two processes in one folder", {"new": second(), "resumed": second("--resume")}, trains),
    "H8": Case(
        "S", "losses, parameters and moments that are not finite",
        {
            "NaN": skipped(float("nan")), "∞": skipped(float("inf")),
            "three in a row": ends(three_in_a_row, 1, "loss", removed={".training.loop:MAX_SKIPPED": "99"}),
            "an evaluation": ends(no_number, 1, "validation loss", "step-0 is still good", ANY_LOSS, Unlike),
            "parameters": never_saved("params", "hf", LlamaError), "moments": never_saved("first", "hf"),
            "parameters, by orbax": never_saved("params", "orbax"), "moments, by orbax": never_saved("first", "orbax"),
        },
        trains,
    ),
    "H10": Case(
        "C", "nonsense numbers",
        {
            **told("lr", "--lr 0"), **told("lr", "--lr -1", Unlike), **told("lr", "--lr 1e999"),
            **told("final_lr", "--final-lr 1"), **told("final_lr", "--final-lr -1"),
            **told("warmup", "--warmup 11 --steps 10"), **told("warmup", "--warmup -1"),
            **told("steps", "--steps 0"), **told("batch", "--batch 0", ZeroDivisionError),
            **told("batch", "--batch -4"),
            **told("micro_batch", "--micro-batch 3 --batch 8"), **told("micro_batch", "--micro-batch 0"),
            **told("micro_batch", "--micro-batch 16 --batch 8"),
            **told("weight_decay", "--weight-decay -1"), **told("clip", "--clip 0"), **told("clip", "--clip -1"),
            **told("beta1", "--beta1 1"), **told("beta1", "--beta1 -0.1"), **told("beta2", "--beta2 1.0"),
            **told("seed", "--seed -1"), **told("seed", "--seed 4294967296"),
            **told("val_fraction", "--val-fraction 1"), **told("val_fraction", "--val-fraction -0.1"),
            **told("eval_every", "--eval-every 0"), **told("eval_batches", "--eval-batches 0"),
            **told("save_every", "--save-every 0"), **told("keep", "--keep 0"), **told("patience", "--patience 0"),
            **told("sample", "--sample -1"), **told("ctx", "--ctx 0"), **told("ctx", "--ctx 257 --config stories15m"),
            **told("layers", "--layers 0"), **told("heads", "--heads 0"), **told("heads", "--heads 3"),
            **told("heads", "--heads 4 --dim 12", Unlike), **told("kv_heads", "--heads 4 --kv-heads 3"),
            **told("kv_heads", "--kv-heads 8", Unlike), **told("hidden_dim", "--hidden-dim 0"),
            **told("dim", "--dim -8", Unlike),
            **told("theta", "--theta 1"), **told("vocab", "--vocab 0"),
            **told("lora", "--lora 4"), **told("lora", "--lora 0"), **told("lora_alpha", "--lora-alpha 0"),
            **told("lora_targets", "--lora-targets q,x"), **told("layers", "--init-from x --layers 2"),
            **text_of("--lr nan"), **text_of("--lr 1_0"), **text_of("--batch 2.5"), **text_of("--steps many"),
            **text_of("--dtype int8"), **text_of("--remat all"), **text_of("--config llama-9"),
        },
        trains,
    ),
    "H11": Case(
        "S", "which checkpoints are deleted, and when",
        {
            "9 and 10": guarded(in_order(lambda step: 10**9 + step), BY_NAME, FileNotFoundError),
            "the clock set back": guarded(in_order(lambda step: 10**9 - step), BY_TIME),
            "a new one that fails": guarded(new_before_old, EAGER),
            "the best": guarded(best_stays, ONLY_LAST),
        },
        trains,
    ),
    "H12": Case(
        "S", "file modes and links",
        {
            "umask": guarded(modes, PRIVATE), "a link": guarded(linked, MADE),
            "moved": guarded(moved, ABSOLUTE, LlamaError), "over itself": guarded(over_itself, IN_PLACE, OSError),
        },
        trains,
    ),
}  # fmt: skip
