"""What a compiled program does, read off its text in XLA's intermediate language: its collectives and its products.

The body of a loop stands in the text once, and is counted as often as it runs. XLA's own cost analysis counts it once.
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+)(?:e\dm\d\w*)?\[([\d,]*)\]")
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
CALLS = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


class Line(NamedTuple):
    """An instruction: its result's shapes, what it does, and the rest of its text, which begins with the operands."""

    name: str
    shapes: list[tuple[str, tuple[int, ...]]]
    kind: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    def ints(self, field: str) -> tuple[int, ...]:
        found = re.search(rf"\b{field}=\{{([\d,]*)\}}", self.rest)
        return ints(found[1] if found else None)


def ints(text: str | None) -> tuple[int, ...]:
    """The numbers of a list."""
    return tuple(int(n) for n in (text or "").split(",") if n)


class Collective(NamedTuple):
    """Communication: how many bytes each device gives to it, in a group of how many, and how often in a step."""

    kind: str
    bytes: int
    size: int
    group: tuple[int, ...]  # one of the groups, by the numbers of its devices
    times: int
    shape: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together, by the algorithms for a ring.

        Thakur, Rabenseifner & Gropp 2005, IJHPCA 19(1), §4."""
        once = {"all-gather": self.size - 1, "all-reduce": 2 * (self.size - 1) / self.size, "collective-permute": 1}
        return float(self.times * self.bytes * once.get(self.kind, (self.size - 1) / self.size))


class Program(NamedTuple):
    """What one device executes in a step."""

    collectives: list[Collective]
    flops: int  # of matrix products
    endless: int  # loops whose number of turns is not in the text: counted as one


def read_program(text: str, devices: int) -> Program:
    """The collectives and the operations of the products of a program's text."""
    computations, entry = split(text)
    found, flops, endless = dict[tuple[str, ...], Collective](), 0, 0
    for loop, scope, line, times in walk(computations, entry, entry, 1):
        lines = computations[scope]
        kind = line.kind.removesuffix("-start")
        if kind in KINDS:
            kind = "reduce-scatter" if scope.startswith("all-reduce-scatter") else kind
            one = collective(kind, line, lines, times, devices)
            # A TPU spreads a collective over several fusions of a loop, in each of which it stands whole.
            channel = None if scope == loop.rpartition("/")[2] else re.search(r"channel_id=\d+", line.rest)
            found[(loop, kind, channel[0], one.shape) if channel else (loop, scope, line.name)] = one
        elif line.kind in ("dot", "convolution"):
            flops += times * products(line, lines)
        endless += line.kind == "while" and turns(line, computations[scope], computations) is None
    return Program([*found.values()], flops, endless)


def split(text: str) -> tuple[dict[str, dict[str, Line]], str]:
    """The computations by name, each as its instructions by name; and the name of that which is the program."""
    computations, lines, entry = dict[str, dict[str, Line]](), dict[str, Line](), ""
    for row in text.splitlines():
        if head := HEAD.match(row):
            lines = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := LINE.match(row):
            shapes = [(kind, ints(sizes)) for kind, sizes in SHAPE.findall(found[2])]
            lines[found[1]] = Line(found[1], shapes, found[3], found[4])
    return computations, entry


def walk(
    computations: dict[str, dict[str, Line]], scope: str, loop: str, times: int
) -> Iterator[tuple[str, str, Line, int]]:
    """Every instruction that is executed: the path of the loops around it, its computation, itself, and how often."""
    for line in computations[scope].values():
        yield loop, scope, line, times
        called = ",".join(several or one for several, one in CALLS.findall(line.rest))
        for name in re.findall(r"[\w.\-]+", called):
            if line.kind == "while":
                often = times * (turns(line, computations[scope], computations) or 1)
                yield from walk(computations, name, f"{loop}/{line.name}/{name}", often)
            else:
                yield from walk(computations, name, loop, times)


def turns(loop: Line, scope: dict[str, Line], computations: dict[str, dict[str, Line]]) -> int | None:
    """How often the body of a loop runs: as XLA notes, or by its counter, what that is compared to, and its step.

    None where they are not constants. A loop that was unrolled has a step of more than 1."""
    if known := re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    named = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", loop.rest)
    if not named:
        return None
    condition, body = computations[named[1]], computations[named[2]]
    compared = [line for line in condition.values() if line.kind == "compare" and "direction=LT" in line.rest]
    fields = [re.search(r"index=(\d+)", condition[name].rest) for line in compared for name in line.operands[:1]]
    if len(fields) != 1 or not fields[0]:
        return None
    counter = int(fields[0][1])
    start, bound = number(element(scope, loop.operands[0], counter), scope), number(compared[0].operands[1], condition)
    added = body[element(body, next(reversed(body)), counter)]
    steps = [number(name, body) for name in added.operands] if added.kind == "add" else []
    step = next((n for n in steps if n), None)
    return None if start is None or bound is None or step is None else -(-(bound - start) // step)


def element(lines: dict[str, Line], tuple_name: str, i: int) -> str:
    """The name of a tuple's i-th element; of the tuple itself, where it is not made here."""
    made = lines[tuple_name]
    return made.operands[i] if made.kind == "tuple" else tuple_name


def number(name: str, lines: dict[str, Line]) -> int | None:
    """The value of a constant, or of a copy of one."""
    line = lines[name]
    while line.kind in ("copy", "bitcast"):
        line = lines[line.operands[0]]
    digits = re.match(r"-?\d+\)", line.rest)
    return int(digits[0][:-1]) if line.kind == "constant" and digits else None


def size_of(shape: tuple[str, tuple[int, ...]]) -> int:
    """The bytes of an array; the digits of a type are its bits, but for pred, which has a byte."""
    kind, sizes = shape
    return math.prod(sizes) * int(re.sub(r"\D", "", kind) or 8) // 8


def collective(kind: str, line: Line, lines: dict[str, Line], times: int, devices: int) -> Collective:
    """A collective by its line."""
    shapes = [shape for name in line.operands for shape in lines[name].shapes]
    groups = groups_of(line.rest, devices)
    shape = ", ".join(f"{kind}[{','.join(map(str, sizes))}]" for kind, sizes in shapes)
    return Collective(kind, sum(map(size_of, shapes)), groups.shape[1], tuple(groups[0].tolist()), times, shape)


def groups_of(rest: str, devices: int) -> Int[np.ndarray, "groups size"]:
    """The groups of devices, one a row, in each of the forms in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        rows = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        return np.array([row for row in rows if row[0] != row[1]] or rows[:1], int)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])], int)
    if made := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return numbered(made[3], made[4]).reshape(int(made[1]), int(made[2]))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? ?\{(.*?)\}", rest):
        places = groups_on_mesh(mesh[1], mesh[3])
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2] or f"[{places.size}]")
        return (numbered(order[1], order[2]) if order else np.array(mesh[2].split(","), int))[places]
    return np.arange(devices)[None]


def numbered(sizes: str, order: str | None) -> Int[np.ndarray, " devices"]:
    """The numbers from 0 in an array of these sizes, its axes in another order."""
    shape, axes = ints(sizes), ints(order)
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes or range(len(shape))).reshape(-1)


def groups_on_mesh(axes: str, over: str) -> Int[np.ndarray, "groups size"]:
    """Groups along axes of a mesh, or along parts of them: 'a':(2)4 is the second of a's factors 2, 4, …."""
    sizes, split_at = dict(re.findall(r"'(\w+)'=(\d+)", axes)), dict[str, tuple[int, int]]()
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        split_at[name] = (int(before or 1), int(size or sizes[name]))
    shape, kept = list[int](), list[bool]()
    for name, whole in sizes.items():
        before, size = split_at.get(name, (int(whole), 1))
        shape += [before, size, int(whole) // (before * size)]
        kept += [True, name not in split_at, True]
    order = [i for i, stays in enumerate(kept) if stays] + [i for i, stays in enumerate(kept) if not stays]
    count = math.prod(size for size, stays in zip(shape, kept, strict=True) if not stays)
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1, count)


# ---- Products --------------------------------------------------------------------------------------------------------


def products(line: Line, lines: dict[str, Line]) -> int:
    """Floating-point operations of a matrix product: two for each multiplication and addition."""
    left, right = (lines[name].shapes[0][1] for name in line.operands[:2])
    if line.kind == "dot":
        return 2 * math.prod(line.shapes[0][1]) * math.prod(left[i] for i in line.ints("lhs_contracting_dims"))
    return 2 * convolution(line, left, right)


def convolution(line: Line, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Multiplications of a convolution, which is how a TPU's compiler writes products; those with padding are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    if not labels:
        return 0
    sizes = [dict(zip(name, shape, strict=True)) for name, shape in
             zip(labels.groups(), (left, right, line.shapes[0][1]), strict=True)]  # fmt: skip
    window = re.search(r"window=\{(.*?)\}", line.rest)
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}
    total = sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis in range(sum(label.isdigit() for label in labels[1])):
        given = {name: value.split("x")[axis] for name, value in fields.items()}
        places = [shape[str(axis)] for shape in sizes]
        step, lhs, rhs = (int(given.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        total *= inside(*places, step, int(given.get("pad", "0_0").split("_")[0]), lhs, rhs)
    return total


@cache
def inside(size: int, kernel: int, out: int, step: int, pad: int, lhs: int, rhs: int) -> int:
    """Along one axis of a convolution, how many pairs of an output and a kernel element meet one of the input."""
    at = np.arange(out)[:, None] * step + np.arange(kernel) * rhs - pad
    return int(np.count_nonzero((at >= 0) & (at <= (size - 1) * lhs) & (at % lhs == 0)))
