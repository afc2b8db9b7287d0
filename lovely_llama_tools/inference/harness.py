"""An adapter for EleutherAI's lm-eval: a model class for its harness, running tasks, and its command line."""

import contextlib
import hashlib
import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from lovely_llama import LlamaError, Sampling, check, is_whole

from ..extras import extra, progress
from ..formats.files import load
from ..formats.model import Model
from ..tokens import Tokenizer, check_text, encode_parts
from .batch import BATCH, Settings, in_order
from .chat import chat_text, template_of
from .generate import checked
from .scoring import scored

NEW = 256  # maximum tokens of an answer, unless the task sets it
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of that, the first counts
BOOTSTRAPS = 1000  # samples from which lm-eval estimates the errors of metrics that are no means


def harness(model: Model, batch: int | str = 1) -> Any:
    """Wrap a model for lm-eval: `simple_evaluate(model=harness(model), tasks=…)`.

    It scores as lm-eval's backend for transformers does: in windows of the whole context, with BOS (EOS if there is
    none) as the context of a text without one. `batch` requests are computed at a time. The call also registers
    `lovely-llama` as a model type of lm-eval, with the arguments `pretrained=PATH`, `dtype` and `batch_size`.
    """
    return adapter()(model, batch_size=batch)


def encode(tokenizer: Tokenizer, text: str, special: bool | None) -> list[int]:
    """Tokenize a text, with BOS first if `special` or, by default, if the model expects it; never twice."""
    check_text("text", text)
    names = [name for name, i in tokenizer.specials.items() if i == tokenizer.bos]
    begun = special is None and any(text.startswith(name) for name in names)
    bos = [] if tokenizer.bos is None or begun or not (tokenizer.adds_bos and special is not False) else [tokenizer.bos]
    return [*bos, *chain.from_iterable(encode_parts(tokenizer, text, True))]


def settings_of(model: Model, options: Mapping[str, Any], seed: int) -> Settings:
    """What a task sets for the generation of an answer: greedy, of `NEW` tokens, unless it says otherwise."""
    given = options.get("until") or ()
    until: list[str] = [given] if isinstance(given, str) else [*given]
    most = next((options[name] for name in LENGTHS if options.get(name) is not None), NEW)
    good = is_whole(most) and 0 < most < model.config.ctx
    check("max_gen_toks", most, good, f"a number from 1 to {model.config.ctx - 1}", "task")
    greedy = Sampling(repetition_penalty=None, temperature=0.0, top_k=None, top_p=1.0, min_p=None)
    wanted: dict[str, Any] = greedy._asdict()
    beams, known = options.get("num_beams", 1), {*LENGTHS, *wanted, "until", "do_sample", "num_beams"}
    unknown = ", ".join(f"{k}={v}" for k, v in options.items() if k not in known or (k == "num_beams" and beams != 1))
    check("generation_kwargs", unknown, not unknown, f"until, do_sample, max_gen_toks, {', '.join(wanted)}", "task")
    wanted |= {name: options[name] for name in wanted if options.get(name) is not None}
    warm, sampled = wanted["temperature"], options.get("do_sample")
    check("temperature", f"{warm} with do_sample", bool(warm) or sampled is not True, "a number above 0", "task")
    wanted["temperature"] = 0.0 if sampled is False else warm
    wanted["top_k"] = wanted["top_k"] or None  # 0 is no limit
    return checked(model, int(most), Sampling(**wanted), seed, [text for text in until if text])


def continued(text: str, last: str) -> str:
    """A rendered conversation up to the end of its last message, which the model is to continue."""
    said = last.strip()
    check("chat_template", "a text without the last message", said in text, "one with it", "model")
    end, space = text.rindex(said) + len(said), last[len(last.rstrip()) :]
    return text[: end + (len(space) if text[end:].startswith(space) else 0)]


def adapter() -> type[Any]:
    """The model class for lm-eval, defined here since its base class is in an optional package."""
    api: Any = extra("lm_eval.api.model", "eval")
    registry: Any = extra("lm_eval.api.registry", "eval")
    utils: Any = extra("lm_eval.utils", "eval")

    class LovelyLlama(api.TemplateLM):
        """A model of this library."""

        def __init__(
            self, model: Model | None = None, pretrained: str | None = None, dtype: str | None = None,
            batch_size: int | str | None = None, max_batch_size: int | None = None, device: str | None = None,
            base: str | None = None, allow: str | None = None, **others: object,
        ) -> None:  # fmt: skip
            api.TemplateLM.__init__(self)
            unknown = ", ".join(name for name, value in others.items() if value is not None)
            check("model_args", unknown, not unknown, "pretrained, base, allow, dtype and batch_size", "lm-eval")
            size = str(batch_size or 1).partition(":")[0]
            good = size == "auto" or (size.isdecimal() and int(size) > 0)
            check("batch_size", batch_size, good, "a whole number from 1, or auto", "lm-eval")
            self.batch_size = BATCH if size == "auto" else int(size)
            if model is None and pretrained is None:
                raise LlamaError("lm-eval", "model_args", "no model", "pretrained=PATH")
            if model is None:
                kind, fields = None if dtype == "auto" else dtype, allow.split("+") if allow else []
                model = load(str(pretrained), kind, base=base, allow=fields)
            self.model = model
            if self.model.tokenizer is None:
                raise LlamaError("model", "tokenizer", "none", "a model with one")
            self.tokens: Tokenizer = self.model.tokenizer
            self.template: str | None = None

        @property
        def eot_token_id(self) -> int | None:
            return self.tokens.eos if self.tokens.eos is not None else self.tokens.bos

        @property
        def prefix_token_id(self) -> int | None:
            return self.tokens.bos if self.tokens.bos is not None else self.eot_token_id

        @property
        def max_length(self) -> int:
            return self.model.config.ctx

        @property
        def tokenizer_name(self) -> str:
            """Under which lm-eval caches prompts: it stands for what makes tokens, and for the template."""
            made = repr((self.tokens.pieces, self.tokens.specials, self.tokens.adds_bos, self.tokens.template))
            return f"lovely-llama-{hashlib.sha256(f'{made}{self.template}'.encode()).hexdigest()[:16]}"

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The source of the template; a name chooses one of several, from now on."""
            if not chat_template:
                return None
            self.template = chat_template if isinstance(chat_template, str) else None
            return template_of(self.tokens, self.template)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            """The text of a conversation. Templates that refuse a system message get none."""
            render = partial(
                chat_text, self.tokens, template=self.template, add_generation_prompt=add_generation_prompt
            )
            others = [said for said in chat_history if said["role"] != "system"]
            try:
                text = render(chat_history)
            except LlamaError:
                if len(others) == len(chat_history):
                    raise
                text = render(others)
            return text if add_generation_prompt else continued(text, chat_history[-1]["content"])

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(self.tokens, string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for _, continuation in (request.args for request in requests):
                check("continuation", "an empty text", bool(continuation), "a text", "task")
            return api.TemplateLM.loglikelihood(self, requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            found, rows = dict[int, tuple[float, bool]](), list[tuple[list[int], list[int]]]()
            for text, context, continuation in requests:
                size, most = len(continuation), self.max_length
                asked = f"{size} tokens" + (f" of {text[1][:80]!r} after {text[0][-80:]!r}" if text else "")
                check("continuation", asked, 0 < size <= most, f"1 to {most} tokens", "task")
                whole = [*context, *continuation][-(most + 1) :]
                rows.append((whole[:-1], whole[1:]))
            with progress("scoring", len(rows)) as advance:
                for i, row in scored(self.model, rows, self.batch_size):
                    text, _, continuation = requests[i]
                    last = slice(-len(continuation), None)
                    found[i] = -float(row.nats[last].sum()), bool(row.likeliest[last].all())
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[i])
                    advance(1)
            return [found[i] for i in range(len(rows))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows, owners = list[Any](), list[int]()
            for i, request in enumerate(requests):
                tokens, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
                rolling = utils.get_rolling_token_windows(tokens, prefix, self.max_length, 1)
                some = [(None, *utils.make_disjoint_window(window)) for window in rolling]
                windows, owners = [*windows, *some], [*owners, *[i] * len(some)]
            totals = [0.0] * len(requests)
            for i, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += nats
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            # lm-eval's --seed sets Python's; a request that is repeated comes several times
            seed, prompts, texts = random.getrandbits(32), list[tuple[list[int], Settings]](), list[str]()
            for i, (context, options) in enumerate(request.args for request in requests):
                settings = settings_of(self.model, options, (seed + i) % 2**32)
                prompts.append((self.tok_encode(context)[-(self.max_length - settings[0]) :], settings))
            with progress("generating", len(requests)) as advance:
                for request, done, (_, settings) in zip(
                    requests, in_order(self.model, prompts, self.batch_size), prompts, strict=True
                ):
                    text = self.tokens.decode(done.tokens)  # as a text of its own: without a space that begins it
                    ends = [text.index(stop) for stop in settings[3] if stop in text]
                    texts.append(text[: min(ends)] if ends else text)
                    self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                    advance(1)
            return texts

    with contextlib.suppress(ValueError):  # already registered
        registry.register_model("lovely-llama")(LovelyLlama)
    return LovelyLlama


def run_tasks(
    model: Model, tasks: Sequence[str], include_path: str | None = None, batch: int | str = 1, **how: Any
) -> Any:
    """Run tasks, and return what lm-eval finds; `how` goes to its `simple_evaluate`. Its output goes to stderr."""
    adapted = harness(model, batch)
    library, managers = extra("lm_eval", "eval"), extra("lm_eval.tasks", "eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    no_forks()
    if how.get("apply_chat_template"):
        adapted.chat_template(how["apply_chat_template"])  # refuses a model without one before tasks are loaded
    with contextlib.redirect_stdout(sys.stderr):
        manager: Any = managers.TaskManager(include_path=include_path, include_defaults=include_path is None)
        if any(name not in manager.all_tasks for name in tasks):  # lm-eval's own are thousands of files
            manager = managers.TaskManager(include_path=include_path)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        check("tasks", ", ".join(unknown), not unknown, "names of lm-eval's tasks, or of those in --include-path")
        return library.simple_evaluate(
            adapted, tasks=[*tasks], task_manager=manager, bootstrap_iters=BOOTSTRAPS, log_samples=False, **how
        )


def no_forks() -> None:
    """Keep lm-eval from its pool of processes: they would be forked from one that has threads, and takes signals."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")


def metrics(found: Any) -> dict[str, Any]:
    """The metrics of each task and group by "task name", those of a filter by "task name,filter"; None for unknown."""
    rows: dict[str, dict[str, Any]] = {**found["results"], **(found.get("groups") or {})}
    return {
        f"{task} {name.removesuffix(',none')}": None if value == "N/A" else value
        for task, row in rows.items()
        for name, value in row.items()
        if name not in ("alias", "name", "sample_len", "sample_count")
    }


def tables(found: Any) -> str:
    """lm-eval's own table of what it found, and that of groups if there are any."""
    make: Any = extra("lm_eval.utils", "eval").make_table
    return "\n".join(make(found, *column) for column in ((), ("groups",)) if not column or found.get("groups"))


def lm_eval(words: Sequence[str]) -> None:
    """lm-eval's own command line, with `lovely-llama` among its model types."""
    adapter()
    no_forks()
    sys.argv = ["lovely-llama lm-eval", *words]
    extra("lm_eval.__main__", "eval").cli_evaluate()
