"""Conversations as training sees them: the tokens of the template, and which of them are learned."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lovely_llama import LlamaError, check

from ..inference.chat import Placed, escape, template_of, tokens_of, unused, variables
from ..tokens import Refused, Tokenizer, render_all
from ..tokens.parts import encode_known, specials
from .records import Conversation

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Answer(NamedTuple):
    """Where an answer stands in a rendered conversation."""

    start: int  # after the prompt that asks for it
    close: int  # after what it says
    limit: int  # where the token that ends it must have come


class Learned(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    answers: list[int]  # 1 for tokens that are learned, else 0
    ended: bool  # whether a token to stop at ends every answer


class Row:
    """A conversation about to be rendered, as it is, and with marks around what its messages say.

    The marks are inside the white space at either end of a message, so that a template may strip it. One of `finish`
    follows what an answer says, and one of `end` what another message says.
    """

    def __init__(self, given: Conversation, tokenizer: Tokenizer, source: str) -> None:
        self.mark, self.end, self.begin, self.finish = unused([*given.messages, dict(given.values)], source, 4)
        self.plain = [{key: part for key, part in message.items() if key != "weight"} for message in given.messages]
        self.messages: list[dict[str, Any]] = escape(tokenizer, self.plain, self.mark)
        self.values = variables(tokenizer) | dict(given.values)
        self.own = repr(sorted((key, given.values[key]) for key in given.values.keys() - {"tools", "documents"}))
        self.said = [i for i, message in enumerate(self.plain) if message["role"] == "assistant"]
        self.weights = [weight_of(given.messages[i]) for i in self.said]
        roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in self.plain))
        got, known = f"{len(self.plain)} of the roles {roles}, none of an assistant", ", ".join(ROLES)
        check("messages", got, bool(self.said), f"an answer to learn from; roles are {known}")
        check("weight", "0 for every answer", any(self.weights), "one that is learned")

    def marked(self) -> list[dict[str, Any]]:
        """Its messages with the marks."""
        found = list[dict[str, Any]]()
        for message in self.messages:
            text, ours = message["content"], message["role"] == "assistant"
            if isinstance(text, str):
                core = text.strip()
                at = text.find(core)
                begin, end = (self.begin, self.finish) if ours else ("", self.end)
                text = f"{text[:at]}{begin}{core}{end}{text[at + len(core) :]}"
            found.append({**message, "content": text})
        return found

    def variables(self, messages: Sequence[Mapping[str, Any]], asks: bool = False) -> dict[str, Any]:
        """Those of the template for some messages, and whether they end in the prompt for an answer."""
        return {**self.values, "messages": [*messages], "add_generation_prompt": asks}


def weight_of(message: Mapping[str, Any]) -> bool:
    """Whether an answer is learned: a weight, as OpenAI's files have it, is 0 or 1."""
    weight = message.get("weight", 1)
    check("weight", repr(weight), weight in (0, 1, None), "0 or 1")
    return weight != 0


class Encoder:
    """Tokenizes conversations by a model's chat template.

    An answer is learned from where the prompt for it ends, up to the token that ends it. Where that prompt ends follows
    from the text between two messages, so that one rendering of a conversation, with marks, shows all its answers; a
    prompt is rendered when such a text is met for the first time, or where the marks change what the template makes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.source = tokenizer, template_of(tokenizer)
        # By the role before an answer, the text between, and the row's own variables: how much of it is the answer's.
        self.leads = dict[tuple[str, str, str], int | None]()

    def encode(self, conversations: Sequence[Conversation]) -> list[Learned | LlamaError]:
        """The tokens of each conversation, or why nothing can be learned from it."""
        rows = list[Row | LlamaError]()
        for given in conversations:
            try:
                rows.append(Row(given, self.tokenizer, self.source))
            except LlamaError as error:
                rows.append(error)
        good = [row for row in rows if isinstance(row, Row)]
        sets = [row.variables(messages) for row in good for messages in (row.messages, row.marked())]
        texts = iter(render_all(self.source, sets) if sets else [])
        found = list[Learned | LlamaError]()
        for row in rows:
            try:
                found.append(row if isinstance(row, LlamaError) else self.learned(row, next(texts), next(texts)))
            except LlamaError as error:
                twice = isinstance(row, Row) and any(j == i + 1 for i, j in pairwise(row.said))
                expected = "one message of both"
                other = LlamaError("row", "messages", "two assistant messages in a row", expected) if twice else error
                found.append(other)
        return found

    def learned(self, row: Row, text: str | Refused, marked: str | Refused) -> Learned:
        """The tokens of a rendered conversation, those of its answers marked."""
        if isinstance(text, Refused):
            raise text
        answers = self.marked_answers(row, text, marked) if isinstance(marked, str) else None
        if answers is None:
            answers = [self.answer(row, text, i) for i in row.said]
        places = [place for answer in answers for place in (answer.start, answer.close)]
        good = all(a <= b for a, b in pairwise(places))
        check("chat_template", "answers that overlap", good, "one after the other", "model")
        placed = tokens_of(self.tokenizer, text, row.mark, places)
        special = specials(self.tokenizer)
        if sum(i in special for i in placed.ids) != len(placed.specials):  # one of them may stand for what is unknown
            for message in row.plain:
                encode_known(self.tokenizer, message["content"] or "")
        mask, ended = [0] * len(placed.ids), True
        for n, answer in enumerate(answers):
            begin, end = placed.places[2 * n][0], placed.places[2 * n + 1][1]
            stop = self.stop(placed, end, answer)
            ended, end = ended and stop is not None, end if stop is None else stop + 1
            if row.weights[n]:
                mask[begin:end] = [1] * (end - begin)
        check("chat_template", "no token of an answer", any(mask), "an answer to learn from", "model")
        return Learned(placed.ids, mask, ended)

    def stop(self, placed: Placed, end: int, answer: Answer) -> int | None:
        """The index of the token that ends an answer."""
        stops, ids = self.tokenizer.stops, placed.ids
        if placed.specials:
            near = [i for at, i in placed.specials if answer.close <= at < answer.limit]
        else:
            near = [*range(end, min(end + 2, len(ids)))]
        return next((i for i in near if ids[i] in stops), None)

    def marked_answers(self, row: Row, text: str, marked: str) -> list[Answer] | None:
        """The answers where the marks show them; None if the marks have changed anything else."""
        events, at, rest = list[tuple[str, int]](), 0, list[str]()
        for part in re.split(f"([{row.end}{row.begin}{row.finish}])", marked):
            if part in (row.end, row.begin, row.finish):
                events.append((part, at))
            else:
                rest.append(part)
                at += len(part)
        kinds = "".join(kind for kind, _ in events)
        pairs, found = len(re.findall(row.begin + row.finish, kinds)), list[Answer]()
        if "".join(rest) != text or not pairs == kinds.count(row.begin) == kinds.count(row.finish) == len(row.said):
            return None
        for n, (kind, begin) in enumerate(events):
            if kind == row.begin:
                before = events[n - 1][1] if n else 0
                lead = self.lead(row, row.said[len(found)], text, before, begin)
                limit = events[n + 2][1] if n + 2 < len(events) else len(text)
                found.append(Answer(begin - lead, events[n + 1][1], limit))
        return found

    def lead(self, row: Row, i: int, text: str, before: int, begin: int) -> int:
        """How much of the text between a message and an answer, message `i`, belongs to the answer."""
        key = row.plain[i - 1]["role"] if i else "", text[before:begin], row.own
        if key not in self.leads:
            start = self.prompt_end(row, i, text)
            self.leads[key] = begin - start if start is not None and before <= start <= begin else None
        lead = self.leads[key]
        if lead is None:
            raise no_prompt(i)
        return lead

    def prompt_end(self, row: Row, i: int, text: str) -> int | None:
        """Where the prompt for message `i` ends in a conversation; None if that does not begin with it."""
        try:
            (prompt,) = render_all(self.source, [row.variables(row.messages[:i], asks=True)])
        except LlamaError:  # as where no message precedes it
            return None
        return len(prompt) if isinstance(prompt, str) and text.startswith(prompt) else None

    def answer(self, row: Row, text: str, i: int) -> Answer:
        """Message `i`, found without marks: from the prompt for it to the end of the conversation up to it."""
        start = self.prompt_end(row, i, text)
        (whole,) = render_all(self.source, [row.variables(row.messages[: i + 1])])
        good = isinstance(whole, str) and text.startswith(whole)
        if start is None or not isinstance(whole, str) or not good or len(whole) < start:
            raise no_prompt(i)
        ends = [
            text.find(name, start) for name, token in self.tokenizer.specials.items() if token in self.tokenizer.stops
        ]
        close = min((at for at in ends if start <= at < len(whole)), default=len(whole))
        return Answer(start, close, len(whole))


def no_prompt(i: int) -> LlamaError:
    """Why message `i` cannot be learned."""
    got = f"a prompt for message {i + 1} that the conversation does not begin with"
    return LlamaError("model", "chat_template", got, "the tokens that ask for an answer, and then the answer")
