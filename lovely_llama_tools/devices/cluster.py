"""Processes that train one model together: how one joins the others, agrees with them, and leaves.

`launch` tells a process where the others are, by three variables of its environment, as anybody may. Where there are
none, jax asks the scheduler that has started it.
"""

import hashlib
import importlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int

import lovely_llama
from lovely_llama import LlamaError, check

from ..interrupts import HERE, JOINED, PARENT, tell, tell_error
from ..strict_json import to_json

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DEVICES, CPUS = "JAX_LOCAL_DEVICE_IDS", "JAX_NUM_CPU_DEVICES"
START, LONG = 300, 86400  # seconds to wait: for processes that are started, and for work that only one of them does
HEARTBEAT = 20  # seconds after which a process that says nothing is taken for dead: all the others then end


ROUND = itertools.count()


# ---- Joining ---------------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this process was started as one of several, according to its environment.

    jax would join whatever scheduler it finds, and hang in a shell that has an allocation of several tasks to itself.
    That this is a TPU VM is known under a private name only: `jax.cloud_tpu_init` is deprecated.
    """
    environment = os.environ
    tasks = [environment.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return (
        any(name in environment for name in (COUNT, INDEX))
        or any(number.isdecimal() and int(number) > 1 for number in tasks)
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or importlib.import_module("jax._src.cloud_tpu_init").running_in_cloud_tpu_vm
    )


def place() -> dict[str, Any]:
    """Where the others are, as the variables of the environment say; nothing where a scheduler is to be asked."""
    given = {name: value for name in (ADDRESS, COUNT, INDEX) if (value := os.environ.get(name))}
    if not given.keys() & {COUNT, INDEX}:
        return {}
    missing = ", ".join({ADDRESS, COUNT, INDEX} - given.keys())
    check("environment", f"no {missing}", not missing, f"all of {ADDRESS}, {COUNT} and {INDEX}, or none", "cluster")
    for name in (COUNT, INDEX):
        check(name, given[name], given[name].isdecimal(), "a whole number", "environment")
    count, index = int(given[COUNT]), int(given[INDEX])
    check(INDEX, index, index < count, f"a number below {count}, the number of processes", "environment")
    return {"coordinator_address": given[ADDRESS], "num_processes": count, "process_id": index}


def environments(count: int, devices: int) -> list[dict[str, str]]:
    """The environment of each process: the coordinator's address, and its own devices."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    shared = {ADDRESS: address, "JAX_COORDINATOR_BIND_ADDRESS": address, COUNT: str(count), CPUS: str(devices)}
    own = [range(i * devices, (i + 1) * devices) for i in range(count)]
    return [{**shared, INDEX: str(i), DEVICES: ",".join(map(str, ids))} for i, ids in enumerate(own)]


@contextmanager
def joined(debug: bool = False) -> Generator[None]:
    """Within, this process is one of several, if it was started as such. None leaves before the others."""
    if not several():
        yield
        return
    where = place()
    tell(HERE)
    own_streams(debug)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM for itself
    try:
        jax.distributed.initialize(**where, initialization_timeout=START, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError, KeyError) as error:
        how = f"a scheduler that jax {jax.__version__} knows, or {ADDRESS}, {COUNT} and {INDEX}"
        raise LlamaError("cluster", "environment", str(error).partition("\n")[0], how) from error
    tell(f"{JOINED} {index()}")
    yield
    wait("end")
    jax.distributed.shutdown()


def own_streams(debug: bool) -> None:
    """Keep stdout and stderr to Python: the runtime's messages and stacks, in C++, are shown for debugging only."""
    sink = os.dup(2) if debug else os.open(os.devnull, os.O_WRONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if (stream := getattr(sys, name)) is not None:
            stream.flush()
            own = os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
            setattr(sys, name, own)
        os.dup2(sink, number)
    os.close(sink)


def leave(status: int) -> None:
    """End here and now if this process has joined others and not left them in order: they will never come to the end.

    At its exit jax would wait for them.
    """
    if jax.distributed.is_initialized():
        end(status)


def end(status: int) -> NoReturn:
    """End the process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


# ---- Agreeing --------------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this one; process 0 alone writes."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def client() -> Any:
    """The runtime's key-value store, which works without devices. It has no public name."""
    return importlib.import_module("jax._src.distributed").global_state.client


def wait(name: str) -> None:
    """Wait until all processes wait here. A name is for one use."""
    if processes() > 1:
        client().wait_at_barrier(f"lovely-llama/{name}", LONG * 1000)


@contextmanager
def in_turn(name: str) -> Generator[None]:
    """Within, process 0 is alone; the others come after it."""
    if index():
        wait(name)
    yield
    if not index():
        wait(name)


def largest(number: int) -> int:
    """The largest of the numbers that the processes have, which all must ask for."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if processes() > 1 else number


def own_rows(sharding: NamedSharding, rows: int, seq: int) -> list[int]:
    """The rows of a batch of which devices of this process hold a part."""
    places = sharding.addressable_devices_indices_map((rows, seq)).values()
    return sorted({row for place in places if place for row in range(rows)[place[0]]})


def spread(ids: Int[np.ndarray, "own seq"], own: Sequence[int], rows: int, sharding: NamedSharding) -> Any:
    """A batch over the devices of all processes; `ids` are those of its rows that are this process's own."""
    at = {row: i for i, row in enumerate(own)}

    def part(place: tuple[slice, ...]) -> Int[np.ndarray, "rows seq"]:
        return ids[[at[row] for row in range(rows)[place[0]]]][:, place[1]]

    return jax.make_array_from_callback((rows, ids.shape[1]), sharding, part)


def gathered(tree: Any) -> Any:
    """The whole arrays of a tree that devices of several processes hold, in the memory of each process."""
    if processes() == 1:
        return tree
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def agree_on(marks_of: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse to go on if a process has other marks than process 0: one line names the mark and the process."""
    if processes() == 1:
        return
    store, prefix, wait = client(), f"lovely-llama/marks {next(ROUND)}", LONG * 1000
    store.key_value_set(f"{prefix}/{index()}", to_json(marks_of(), sort_keys=True))
    if index() == 0:
        all_marks = [json.loads(store.blocking_key_value_get(f"{prefix}/{i}", wait)) for i in range(processes())]
        store.key_value_set(f"{prefix}/verdict", to_json(difference(all_marks)))
    verdict = json.loads(store.blocking_key_value_get(f"{prefix}/verdict", wait))
    if not verdict:
        return
    process, key, got, expected = verdict
    error = LlamaError(f"process {process}", key, got, f"{expected}, as process 0 has")
    with suppress(jax.errors.JaxRuntimeError):  # the runtime aborts the others once process 0, with its store, has left
        if index():
            tell_error(str(error), 2)
            store.key_value_set(f"{prefix}/read by {index()}", "")
        else:
            for i in range(1, processes()):
                store.blocking_key_value_get(f"{prefix}/read by {i}", START * 1000)
    if index() and PARENT not in os.environ:
        end(2)  # a scheduler would show the line once for each process
    raise error


def difference(marks: list[dict[str, Any]]) -> list[Any] | None:
    """The first process that differs from process 0, and in what; None where all are the same."""
    for process, (mine, others) in enumerate((marks[0], others) for others in marks):
        for key in sorted(mine.keys() | others.keys()):
            if mine.get(key) != others.get(key):
                return [process, key, str(others.get(key)), str(mine.get(key))]
    return None


def code() -> str:
    """The SHA-256 of this project's code, with the version of jax."""
    digest, tools = hashlib.sha256(jax.__version__.encode()), Path(__file__).parents[1]
    for path in [Path(lovely_llama.__file__), *sorted(tools.rglob("*.py"))]:
        data = path.read_bytes()
        digest.update(f"\n{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
