"""Mutation testing: put faults into copies of the project, one at a time, and check that the part's own tests fail.

    ./dev mutants            for each fault below, the test that kills it, or that it survives (exit status 1)
    ./dev mutants --lines    the same, leaving out each statement in turn; NAMEs are then parts (3) or modules (tokens)
    ./dev mutants NAME ...   only these faults

A mutant counts as killed only if a test of its own part or module fails; a crash does not count.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lovely_llama_tools.comparing.bugs import BUGS
from lovely_llama_tools.comparing.variants import Words, library, rewritten

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lovely_llama_tools"
TOOLS = sorted(
    str(path.relative_to(PACKAGE).with_suffix(""))
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


class Mutant(NamedTuple):
    """A fault: `new` in place of `old`, or a row of the catalogue. `bug` is its number among those that have occurred
    elsewhere."""

    name: str
    where: int | str  # a part of the library, or a module of the tools
    old: str
    new: str
    bug: int | None = None
    words: tuple[Words, ...] = ()

    def source(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / file_of(self.where)).read_text()
        changes = [(library()[function].text, new) for function, new in rewritten(self.words).items()]
        for old, new in changes or [(self.old, self.new)]:
            assert text.count(old) == 1, f"{self.name}: {old!r} occurs {text.count(old)} times"
            text = text.replace(old, new)
        return text


def row(name: str, where: int, bug: int | None = None) -> Mutant:
    """A row of the catalogue of known bugs that changes words."""
    return Mutant(name, where, "", "", bug, BUGS[name].words)


MUTANTS = [
    # Bugs that have occurred in public code.
    Mutant("rotary pairs taken as halves", 2, "a, b = float32_or_wider(x).reshape(-1, 2).T", "a, b = float32_or_wider(x).reshape(2, -1)", 1),
    Mutant("rows of k left as Hugging Face has them", "formats/layout", 'array.reshape(*heads, 2, width // 2, dim)', 'array.reshape(*heads, 2, width // 2, dim) if path[-1].name == "q" else array.reshape(*heads, width // 2, 2, dim).swapaxes(-3, -2)', 2),
    Mutant("query heads grouped the other way", 3, "vmap(group)(w.q,", "vmap(group)(w.q.reshape(w.q.shape[1], len(w.q), *w.q.shape[2:]).swapaxes(0, 1),", 3),
    Mutant("theta not passed", 2, "config.theta ** (2", "1e4 ** (2", 4),
    Mutant("llama3 scaling missing", 2, "scaling = config.rope_scaling or RopeScaling(", "scaling = RopeScaling(", 5),
    row("yarn's ramp turned round", 2, 6),
    Mutant("positions in bfloat16", 2, "f * jnp.asarray(position, f.dtype)", "f * jnp.asarray(position, jnp.bfloat16).astype(f.dtype)", 8),
    Mutant("eps of another model", 2, "lax.rsqrt(eps +", "lax.rsqrt(1e-6 +", 9),
    Mutant("the norm's mean in low precision", 2, "jnp.mean(x32**2)", "jnp.mean(x**2).astype(jnp.float32)", 10),
    row("norm over positions too", 3, 11),
    row("rotation without its sines", 2, 12),
    Mutant("a tied model untied", 4, "None if config.tied else embed)", "embed)", 13),
    Mutant("a row knows nothing of its start", 3, "last = where.start + jnp.arange(len(x))", "last = jnp.arange(len(x))", 14),
    row("id 0 embedded as zeros", 3, 15),
    Mutant("a block with nothing to see is NaN", "fast/attention", "jnp.ceil(jnp.maximum(shift, scores.max()))", "jnp.ceil(scores.max())", 16),
    Mutant("cache written one late", 3, "start_index=where.start,", "start_index=where.start + 1,", 17),
    Mutant("two BOS", "tokens/base", "return bos + self.encode", "return bos + bos + self.encode", 18),
    Mutant("one EOS of several", "tokens/base", "{*ends, eos})", "{eos})", 19),
    Mutant("a character's last bytes lost", "inference/generate", 'getincrementaldecoder("utf-8")("replace")', 'getincrementaldecoder("utf-8")("ignore")', 20),
    Mutant("top-p drops the token that crosses", 6, "1 + below_p.sum()))", "below_p.sum()))", 21),
    Mutant("bisected top-p drops the token that crosses", "fast/samplers", "return above | (equal & (ids <= last))", "return above | (equal & (ids < last))", 21),
    Mutant("packed documents see each other", 5, "logits(params, tokens, config, first))(rows", "logits(params, tokens, config, 0))(rows", 23),
    Mutant("packed documents see each other where it is fast", "fast/objective", "logits(params, tokens, config, first, keep", "logits(params, tokens, config, 0, keep", 23),
    Mutant("up scaled in place of down", 4, 'in ("o", "down") else', 'in ("o", "up") else', 25),
    # Our own.
    Mutant("mask one short", 2, "(position <= last)", "(position < last)"),
    row("mask one long", 2),
    Mutant("keys counted twice where blocks overlap", "fast/attention", "jnp.maximum(i * size, first) <= position", "first <= position"),
    Mutant("a block with nothing to see comes first", "fast/attention", "(lowest, zeros[0], zeros)", "(lowest - jnp.inf, zeros[0], zeros)"),
    Mutant("scores not scaled", 2, "@ float32_or_wider(q) / math.sqrt(len(q))", "@ float32_or_wider(q)"),
    Mutant("sum not rescaled", "fast/attention", "rescale * total + weights.sum()", "total + weights.sum()"),
    Mutant("average not rescaled", "fast/attention", "rescale * average + weights @ v", "average + weights @ v"),
    Mutant("a block's mask one short", "fast/attention", "(position <= last)", "(position < last)"),
    Mutant("a block's mask one long", "fast/attention", "(position <= last)", "(position <= last + 1)"),
    Mutant("scores of a block not scaled", "fast/attention", "float32_or_wider(q) / math.sqrt(head_dim) @ k.T", "float32_or_wider(q) @ k.T"),
    Mutant("the last block not read", "fast/attention", "filled=where.start + len(x),", "filled=where.start + len(x) - 1,"),
    Mutant("softmax overflows", 2, "jnp.exp(x - x.max())", "jnp.exp(x)"),
    row("gain before the norm", 2),
    Mutant("silu on the wrong branch", 2, "silu(gate @ x) * (up @ x)", "(gate @ x) * silu(up @ x)"),
    Mutant("silu by x / (1 + exp(-x))", 2, "(x32 * lax.logistic(x32))", "(x32 / (1 + jnp.exp(-x32)))"),
    row("frequencies multiplied by the factor", 2),
    Mutant("llama3's ends swapped", 2, "(2 * math.pi) - scaling.low)", "(2 * math.pi) - scaling.high)"),
    row("values rotated", 3),
    row("queries not rotated", 3),
    Mutant("yarn sharpens one side only", 3, "attention_factor**2", "attention_factor"),
    row("attention not added to its input", 3),
    row("halves in parallel", 3),
    Mutant("norms mixed up", 3, "rms_norm(x, w.ffn_norm", "rms_norm(x, w.attn_norm"),
    Mutant("layers reversed", 3, "zip(params.blocks, cache,", "zip(params.blocks[::-1], cache,"),
    Mutant("layers in a loop reversed", "fast/layers", "zip(blocks, cache,", "zip(blocks[::-1], cache,"),
    row("last norm left out", 3),
    row("embedding scaled by sqrt(dim)", 3),
    Mutant("the prompt's last token read twice", "inference/generate", "min(len(self.tokens), len(tokens) - 1)", "min(len(self.tokens), len(tokens) - 2)"),
    Mutant("count forgets a layer", 4, "(config.layers - 1) * layer", "(config.layers - 2) * layer"),
    Mutant("ignored targets counted", 5, "targets.reshape(-1) >= 0", "targets.reshape(-1) >= -1"),
    Mutant("mean over ignored targets", 5, "jnp.maximum(counted.sum(), 1).astype", "jnp.array(counted.size).astype"),
    Mutant("cross-entropy's sign", 5, "- chosen, 0)", "+ chosen, 0)"),
    Mutant("accumulation averages means", "fast/objective", "(counts / jnp.maximum(counts.sum(), 1), *rows", "(jnp.full(len(counts), 1 / len(counts)), *rows", 22),
    Mutant("decay by the number of axes", 5, "0 if jax.tree_util.keystr(path[-1:], simple=True) in GAINS else decay", "decay if θ.ndim > 1 else 0", 25),
    Mutant("decay not decoupled", 5, "m = β1 * m + (1 - β1) * g", "g = g + decay * θ; m = β1 * m + (1 - β1) * g"),
    Mutant("no bias correction", 5, "m / correction1.astype(m.dtype)", "m"),
    Mutant("epsilon inside the root", 5, "jnp.sqrt(v_hat) + eps", "jnp.sqrt(v_hat + eps)"),
    Mutant("clipping to the limit from below too", 5, "jnp.minimum(1, limit / norm)", "(limit / norm)"),
    Mutant("norm of one leaf at a time", 5, "jnp.minimum(1, limit / norm)", "jnp.minimum(1, limit / jnp.sqrt(jnp.vdot(w, w)))"),
    Mutant("warm-up from one step on", 5, "peak * step / warmup", "peak * (step + 1) / warmup"),
    Mutant("cosine to the end of all steps", 5, "max(steps - warmup, 1)", "max(steps, 1)"),
    Mutant("adapters not scaled", 5, "scale * product(*adapter)", "product(*adapter)"),
    Mutant("master weights cast for good", "fast/objective", "w.astype(dtype or w.dtype)", "w"),
    Mutant("temperature the wrong way", 6, "below / t)", "below * t)"),
    Mutant("top-k keeps one more", 6, "place < k", "place <= k"),
    Mutant("equals ranked by the higher id", 6, "order = jnp.argsort(-logits)", "order = len(logits) - 1 - jnp.argsort(-logits[::-1])"),
    Mutant("bisected top-k keeps one more", "fast/samplers", "jnp.ones(len(logits), int), k)", "jnp.ones(len(logits), int), k + 1)"),
    Mutant("all that equal the cut-off are kept", "fast/samplers", "return above | (equal & (ids <= last))", "return above | equal"),
    Mutant("negative numbers in the wrong order", "fast/samplers", "jnp.where(bits < sign, bits | sign, ~bits)", "bits | sign"),
    Mutant("p = 1 drops what rounding hides", 6, "jnp.where(p >= 1, len(logits), 1 + below_p.sum())", "1 + below_p.sum()"),
    Mutant("bisection at p = 1 drops what rounding hides", "fast/samplers", "p) | (p >= 1)", "p)"),
    Mutant("the token after the one drawn", 6, "jnp.argmax(cumulative > u)", "jnp.argmax(cumulative > u) + 1"),
    Mutant("bisection draws the next token", "fast/samplers", "jnp.where(ids < n, p, 0).sum() <= u", "jnp.where(ids < n - 1, p, 0).sum() <= u"),
    Mutant("min-p loses equals", 6, "probabilities >= p *", "probabilities > p *"),
    Mutant("penalty rewards negative logits", 6, "x / penalty, x * penalty)", "x / penalty, x / penalty)"),
    Mutant("rows of k permuted by the number of query heads", "formats/layout", "array.reshape(*heads, 2, width // 2, dim)", 'array.reshape(*heads, 2, width // 2, dim) if path[-1].name == "q" else array.reshape(config.kv_heads * config.q_per_kv, 2, -1, dim)'),
    Mutant("GGUF's rows taken for split halves, in and out", "formats/layout", "Layout(0, False), Layout(1, False)", "Layout(0, False), Layout(1, True)"),
    Mutant("q and k written in halves", "formats/gguf", "get, shapes = to_named(GGUF, params", "get, shapes = to_named(GGUF._replace(half_split=True), params"),
    Mutant("gains narrowed", "formats/gguf", "if len(shape) == 1:", "if len(shape) == 0:"),
    Mutant("q8_0 overflows", "formats/gguf", "largest, limit = float(max(rows.max(), -rows.min())), 127 *", "largest, limit = float(max(rows.max(), -rows.min())), 1e9 *"),
    Mutant("bfloat16 read as float16", "formats/gguf", '"BF16": np.dtype(jnp.bfloat16)', '"BF16": np.dtype("<f2")'),
    Mutant("axes as they are stored", "formats/gguf_header", 'scan.numbers("Q", axes)[::-1]', 'scan.numbers("Q", axes)'),
    Mutant("another alignment ignored", "formats/gguf_header", "-(-scan.at // alignment) * alignment", "-(-scan.at // 32) * 32"),
    Mutant("the last part left out", "formats/gguf_header", "range(1, count + 1)", "range(1, count)"),
    Mutant("llama3's factors inverted, in and out", "formats/gguf_rope", "unscaled / rope_frequencies(config)", "rope_frequencies(config) / unscaled"),
    Mutant("a factor without a type ignored", "formats/gguf_rope", '"linear" if "factor" in stated else "default"', '"default"'),
    Mutant("int8 by another scale", "formats/llama2c", "/ np.float32(127)", "/ np.float32(128)"),
    Mutant("every position draws alike", 6, "jax.random.fold_in(rng, position)", "rng"),
    Mutant("what was seen is forgotten", 6, "seen | (jnp.arange(len(seen)) == token)", "seen"),
    Mutant("NaN passes", 6, "jnp.where(jnp.isfinite(penalised).all(), drawn, -1)", "drawn"),
    Mutant("the stop text is shown", "inference/generate", "held[: min(ends)]", "held"),
    Mutant("the cache is not moved when it grows", "inference/generate", "widen(layer.keys, room)", "widen(layer.keys * 0, room)"),
    Mutant("a generation trusts what another left", "inference/generate", "if self.tokens[:known] != tokens[:known]:", "if False:"),
    Mutant("a resume replays data", "training/loop", "range(progress.step, s.steps)", "range(s.steps - progress.step)", 24),
    Mutant("a resume skips data", "training/loop", "range(progress.step, s.steps)", "range(progress.step + (progress.step > 0), s.steps + (progress.step > 0))", 24),
    Mutant("a resume begins with new moments", "training/step", 'read["first"], read["second"]))', 'jax.tree.map(jnp.zeros_like, read["first"]), read["second"]))', 24),
    Mutant("a resume forgets how often it has updated", "training/step", "Moments(jnp.array(updates)", "Moments(jnp.array(0)", 24),
    Mutant("a resume forgets the best", "training/run_folder", "for name in Progress._fields}", 'for name in Progress._fields if name != "best"}', 24),
    Mutant("an evaluation that is owed is not made up for", "training/loop", "if progress.owed and not finished(run, progress):", "if False:", 24),
    Mutant("micro-batches of a batch counted as batches", "training/step", "swapaxes(0, 1) for ids in rows]", "swapaxes(0, 1)[:1] for ids in rows]", 22),
    Mutant("packed documents see each other in a step", "training/step", "options.config, *first, keep", "options.config, keep", 23),
    Mutant("gradients not clipped", "training/step", "gradients, norm = clip(gradients, options.clip)", "_, norm = clip(gradients, options.clip)", 25),
    Mutant("the rate one step late", "training/loop", "learning_rate(progress.step,", "learning_rate(progress.step + 1,", 25),
    Mutant("a step that is not finite is not skipped", "training/step", "jnp.where(finite, new, old)", "new"),
    Mutant("adapters scaled twice", "training/step", "partial(adapt, scale=scale)", "partial(adapt, scale=scale * scale)"),
    Mutant("the mean of batches' means", "training/loop", "total + n * float(loss), targets + n", "total + float(loss), targets + 1"),
    Mutant("the best is deleted with the old", "training/run_folder", "[-last:], progress.best_step}", "[-last:]}"),
    Mutant("steps sorted as texts", "training/run_folder", "return sorted(int(name[1]) for name in names if name)", "return [int(n) for n in sorted(name[1] for name in names if name)]"),
]  # fmt: skip


def file_of(where: int | str) -> str:
    return "lovely_llama.py" if isinstance(where, int) else f"lovely_llama_tools/{where}.py"


def tests_of(where: int | str) -> list[str]:
    """The tests of a part, or of a module: those named after it, else all of its wing."""
    if isinstance(where, int):
        own = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob(f"test_{where}_*.py"))]
        return own + BESIDES.get(where, [])
    wing, _, module = where.rpartition("/")
    named, folder = f"tests/tools/{wing}/test_{module}.py", [f"tests/tools/{wing}"] if wing else []
    return [*([named] if (ROOT / named).exists() else folder), *BESIDES.get(where, [])]


# Tests that stand elsewhere.
BESIDES: dict[int | str, list[str]] = {
    3: ["tests/tools/comparing/test_properties.py"],  # properties of the assembled model
    4: ["tests/test_1_nouns.py"],  # counts and shapes, beside the configs
    "extras": ["tests/tools/test_package.py"],
    "interrupts": ["tests/tools/training/test_train.py"],
    "formats/layout": ["tests/tools/formats/test_gguf.py"],
    "training/step": ["tests/tools/faults/test_faults.py::test_variant[H8-NaN]"],
}


def run(changed: str, source: str, tests: list[str]) -> tuple[str, str]:
    """Run tests with one file changed: ("killed", test), ("crashed", where), ("hung", why) or ("survived", "")."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in (
            "lovely_llama.py",
            "lovely_llama_tools",
            "tests",
            "llama2_c",
            "docs",
            "pyproject.toml",
            "README.md",
            "dev",
        ):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        if (shared := ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to(shared)
        (copy / changed).write_text(source)
        command = [sys.executable, "-B", "-m", "pytest", "-x", "--tb=line", *tests]
        try:
            env = {**os.environ, "PYTHONPATH": str(copy)}
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=env, timeout=600)
        except subprocess.TimeoutExpired:
            return "hung", "not ended in ten minutes"
    if done.returncode == 0:
        return "survived", ""
    failed = re.search(r"^(FAILED|ERROR) \S*?/(\S+)(?: - (.*))?", done.stdout, re.MULTILINE)
    if not failed:
        return "crashed", (done.stdout + done.stderr)[-300:]
    crash = failed[1] == "ERROR" or re.match(
        r"(\w*\.)*(NameError|SyntaxError|AttributeError|Import\w*)", failed[3] or ""
    )
    return "crashed" if crash else "killed", failed[2]


def judge(mutant: Mutant, source: str) -> tuple[str, str]:
    return run(file_of(mutant.where), source, tests_of(mutant.where))


# ---- Statements ------------------------------------------------------------------------------------------------------


class Statement(NamedTuple):
    where: int | str
    text: str
    source: str  # of the file, without the statement


def statements(where: int | str) -> Iterator[Statement]:
    """Every simple statement inside the functions of a part or a module."""
    source = (ROOT / file_of(where)).read_text()
    lines = source.splitlines(keepends=True)
    rulers = [(int(m[1]), source[: m.start()].count("\n") + 1) for m in re.finditer(r"^# ---- (\d+)\.", source, re.M)]
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        part = max((n for n, line in rulers if line <= function.lineno), default=0)
        for node in ast.walk(function) if where in (part, *TOOLS) else ():
            simple = isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.Expr | ast.Raise | ast.Delete)
            if not simple or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                continue
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            text = " ".join(line.strip() for line in lines[first:last])
            gap = [lines[first][: node.col_offset] + "pass\n", *["\n"] * (last - first - 1)]
            yield Statement(where, text, "".join([*lines[:first], *gap, *lines[last:]]))


# Statements whose absence tests may miss, and why.
REASONS = dict[str, str]()


def leave_out(statement: Statement) -> tuple[str, str]:
    """Run the statement's own tests first, then those of the code that uses it."""
    where, _, source = statement
    ended = run(file_of(where), source, tests_of(where))
    for others in (tests_of("inference/generate"), ["tests/tools/faults"]) if ended[0] == "survived" else ():
        ended = ended if ended[0] != "survived" else run(file_of(where), source, others)
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(
        "./dev mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", action="store_true", help="leave out statements instead")
    parser.add_argument("names", metavar="NAME", nargs="*", help="some of the mutants, parts or modules only")
    args = parser.parse_args()
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if args.lines:
            places = [place for place in (*range(1, 9), *TOOLS) if not args.names or str(place) in args.names]
            found = list({s.source: s for place in places for s in statements(place)}.values())
            for statement, (end, _) in zip(found, pool.map(leave_out, found), strict=True):
                if end == "survived":
                    survivors += statement.text not in REASONS
                    why = REASONS.get(statement.text, "no reason")
                    print(f"survived   {statement.where}: {statement.text}   ({why})", flush=True)
            print(f"{len(found)} statements left out, {survivors} survived without a reason")
            return int(survivors > 0)
        chosen = [m for m in MUTANTS if not args.names or m.name in args.names]
        sources = [mutant.source() for mutant in chosen]  # before threads begin: Python 3.11 parses in one at a time
        for mutant, (end, by) in zip(chosen, pool.map(judge, chosen, sources), strict=True):
            survivors += end != "killed"
            number = f"{mutant.bug:2}" if mutant.bug else " –"
            print(f"{number}  {mutant.where!s:19}  {mutant.name:44}  {end:8}  {by}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - survivors} killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
