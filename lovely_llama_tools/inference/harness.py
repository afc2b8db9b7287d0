"""An adapter for EleutherAI's lm-eval: a model class for its harness, and running tasks."""

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lovely_llama import LlamaError, Sampling, check

from ..extras import extra, progress
from ..formats.files import load
from ..formats.model import Model
from ..tokens import Tokenizer
from .generate import Session, generate
from .scoring import scores

NEW = 256  # maximum tokens of an answer, unless the task sets it


def harness(model: Model) -> Any:
    """Wrap a model for lm-eval: `simple_evaluate(model=harness(model), tasks=…)`.

    It scores as lm-eval's backend for transformers does: in windows of the whole context, with BOS (EOS if there is
    none) as the context of a text without one. The call also registers `lovely-llama` as a model type of lm-eval, with
    the argument `pretrained=PATH`."""
    if model.tokenizer is None:
        raise LlamaError("model", "tokenizer", "none", "a model with one")
    return adapter()(model)


def encode(tokenizer: Tokenizer, text: str, special: bool | None) -> list[int]:
    """Tokenize a text, with BOS first if `special` or, by default, if the model expects it; never twice."""
    names = [name for name, i in tokenizer.specials.items() if i == tokenizer.bos]
    begun = special is None and any(text.startswith(name) for name in names)
    bos = [] if tokenizer.bos is None or begun or not (tokenizer.adds_bos and special is not False) else [tokenizer.bos]
    return bos + tokenizer.encode(text, True)


def answer(session: Session, prompt: list[int], options: Mapping[str, Any]) -> str:
    """Generate an answer up to the first stop text; greedily, unless the task sets otherwise."""
    model, given = session.model, options.get("until") or ()
    until: list[str] = [given] if isinstance(given, str) else [*given]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = int(next((options[name] for name in names if options.get(name) is not None), NEW))
    check("max_gen_toks", most, 0 < most < model.config.ctx, f"a number from 1 to {model.config.ctx - 1}", "task")
    warmth = float(options.get("temperature") or 0) if options.get("do_sample") is not False else 0.0
    sampling = Sampling(None, warmth, options.get("top_k"), options.get("top_p") or 1.0, None)
    prompt = prompt[-(model.config.ctx - most) :]
    parts = generate(model, prompt, most, sampling, stop=[text for text in until if text], session=session)
    return "".join(parts)


def adapter() -> type[Any]:
    """The model class for lm-eval, defined here since its base class is in an optional package."""
    api: Any = extra("lm_eval.api.model", "eval")
    registry: Any = extra("lm_eval.api.registry", "eval")
    utils: Any = extra("lm_eval.utils", "eval")

    class LovelyLlama(api.TemplateLM):
        """A model of this library."""

        def __init__(self, model: Model | None = None, pretrained: str | None = None, **_: Any) -> None:
            api.TemplateLM.__init__(self)
            self.model = load(str(pretrained)) if model is None else model
            self.session = Session(self.model)
            self.tokens: Any = self.model.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.tokens.eos if self.tokens.eos is not None else self.tokens.bos

        @property
        def prefix_token_id(self) -> int:
            return self.tokens.bos if self.tokens.bos is not None else self.eot_token_id

        @property
        def max_length(self) -> int:
            return self.model.config.ctx

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return encode(self.tokens, string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            found = list[tuple[float, bool]]()
            with progress("scoring", len(requests)) as advance:
                for text, context, continuation in requests:
                    whole = [*context, *continuation][-(self.max_length + 1) :]
                    row, count = scores(self.model, whole[:-1], whole[1:]), len(continuation)
                    found.append((-float(row.nats[-count:].sum()), bool(row.likeliest[-count:].all())))
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[-1])
                    advance(1)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = list[float]()
            for request in requests:
                tokens, prefix = self.tok_encode(request.args[0]), self.prefix_token_id
                rolling = utils.get_rolling_token_windows(tokens, prefix, self.max_length, 1)
                windows = [(None, *utils.make_disjoint_window(window)) for window in rolling]
                totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(windows)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = list[str]()
            with progress("generating", len(requests)) as advance:
                for context, options in (request.args for request in requests):
                    texts.append(answer(self.session, self.tok_encode(context), options))
                    self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
                    advance(1)
            return texts

    with contextlib.suppress(ValueError):  # already registered
        registry.register_model("lovely-llama")(LovelyLlama)
    return LovelyLlama


def run_tasks(
    model: Model, tasks: Sequence[str], include_path: str | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run tasks and return their metrics by name. The output of lm-eval goes to stderr."""
    adapted = harness(model)
    library, managers = extra("lm_eval", "eval"), extra("lm_eval.tasks", "eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        manager: Any = managers.TaskManager(include_path=include_path, include_defaults=include_path is None)
        if any(name not in manager.all_tasks for name in tasks):  # lm-eval's own are thousands of files
            manager = managers.TaskManager(include_path=include_path)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        check("tasks", ", ".join(unknown), not unknown, "names of lm-eval's tasks, or of those in --include-path")
        found = library.simple_evaluate(
            model=adapted, tasks=[*tasks], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if name not in ("alias", "name")}
        for task, metrics in found["results"].items()
    }
