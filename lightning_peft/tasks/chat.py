"""Conversations in the form of a tokenizer's chat template, and which of their characters an assistant wrote."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.core.problems import an, nearest
from lightning_peft.tasks.answer_tokens import AS_IT_IS, tokens_of
from lightning_peft.tasks.messages import Message
from lightning_peft.tasks.padding import IGNORED

_SHIPPED = Path(__file__).parent / "chat_templates"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# private characters, one for each message, that stand in no text which templates look into
_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD

Span = tuple[int, int]


def template_text(given: str) -> str:
    """The chat template that a name, a file or a template's own text stands for.

    Args:
        given: ``"chatml"``, ``"zephyr"`` or ``"alpaca"``; a file that ends in ``.jinja``; or Jinja.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if there is no such file.
    """
    if "{%" in given or "{{" in given:
        return given
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jinja"))}
    if given in shipped:
        return shipped[given].read_text(encoding="utf-8")
    if not given.endswith(".jinja"):
        raise ValueError(f"chat_template {given!r} is unknown{nearest(given, shipped)} (a file's name ends in .jinja)")
    if not Path(given).is_file():
        raise FileNotFoundError(f"chat_template: there is no file {given!r}")
    return Path(given).read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Form:
    """What a template does around an answer, learnt from a question and an answer.

    Attributes:
        prompt: the question and what asks for the answer.
        surplus: how many of its last characters the whole conversation does not have, such as an opened thought.
        closing: what stands between an answer and its end, such as a space.
        end: the token that ends an answer.
        end_id: its id.
    """

    prompt: str
    surplus: int
    closing: str
    end: str
    end_id: int


class Chat:
    """A chat template and the tokenizer that it is for.

    Where the template marks what an assistant says (``{% generation %}``), those marks are taken. Otherwise an answer
    begins where the template stops when it is asked for that answer (``add_generation_prompt``), and ends with the
    first token that ends a turn; what follows that token, such as a line's end, is not the assistant's. Templates that
    write earlier turns otherwise once later ones follow (thoughts left out, the system prompt moved) are followed in
    the whole conversation: a second rendering in which every message carries an invisible mark shows where each lies.
    Tokens are those that a model meets when it is asked: none begins before an answer and ends within it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: a Jinja template.

    Raises:
        RuntimeError: if the tokenizer tells no places, or the template is none, or ends no turn with a token.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        if not tokenizer.is_fast:
            raise RuntimeError(f"conversations need a fast tokenizer, but this is {an(type(tokenizer).__name__)}")
        self.tokenizer = tokenizer
        self.template = template
        self.is_marked = _MARKS.search(template) is not None
        self._form = self._learn_form()
        self.end = self._form.end_id

    def text(self, messages: list[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """A conversation as text.

        Args:
            messages: the messages.
            tools: descriptions of tools.
            prompt: with what asks for an answer behind it.

        Raises:
            ValueError: if the template refuses the conversation; its own message is passed on.
            RuntimeError: if the template is no template, or writes a special token that the tokenizer lacks.
        """
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateSyntaxError as error:
            raise RuntimeError(f"the chat template is no Jinja: {error.message} (its line {error.lineno})") from error
        except (TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
            lost = re.search(r"'(\w+_token)' is undefined", str(error))
            if lost is not None:
                raise RuntimeError(
                    f"the chat template writes the {lost.group(1)}, which the tokenizer does not have: give it one "
                    f"(tokenizer.{lost.group(1)} = ..., then save it), or another template (task.chat_template=chatml)"
                ) from error
            raise ValueError(f"is refused by the chat template: {error}") from error
        return rendered

    def with_answers(self, messages: list[Message], tools: Any = None, first: int = 0) -> tuple[str, list[Span]]:
        """A conversation as text, and where in it an assistant speaks.

        Args:
            messages: the messages.
            tools: descriptions of tools.
            first: the messages before this one are prompt; what an assistant says there does not count.

        Returns:
            The text, and the first and the last character but one of each answer.

        Raises:
            ValueError: if no assistant speaks, or the template refuses the conversation or leaves a part of it out.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        if not answers:
            roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
            raise ValueError(f"has no turn of an assistant to learn from, only of {roles}")
        if tools and not self._knows_tools():
            raise ValueError("has tools, which the chat template leaves out; take a template that knows tools")
        if self.is_marked:
            text, spans = self._marked(messages, tools)
            return text, spans[len(self._marked(messages[:first], tools)[1]) :] if first else spans
        text = self.text(messages, tools)
        places = self._places(text, messages, tools)
        spans, after = [], 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start(text, messages[:i], tools, after, places[i][0])
                after = self._end(text, places[i][1], "tool_calls" in message)
                spans.append((start, after))
        return text, spans[-len(answers) :]

    def encode(self, messages: list[Message], tools: Any = None, first: int = 0) -> tuple[list[int], list[int]]:
        """A conversation as token ids, and labels that are -100 on all but the answers.

        Args:
            messages: the messages.
            tools: descriptions of tools.
            first: the messages before this one are prompt.

        Raises:
            ValueError: as `with_answers`.
        """
        text, spans = self.with_answers(messages, tools, first)
        ids, begins = tokens_of(self.tokenizer, text, [start for start, _ in spans])
        # a token that begins before the answer, such as a header that swallows the space behind it, is the header's
        counts = np.any([(begins >= start) & (begins < end) for start, end in spans], axis=0)
        return ids.tolist(), np.where(counts, ids, IGNORED).tolist()

    def encode_prompt(self, messages: list[Message], tools: Any = None) -> list[int]:
        """A conversation that is to be answered, as token ids.

        Args:
            messages: the messages.
            tools: descriptions of tools.

        Raises:
            ValueError: as `text`.
        """
        return self._encode(self.text(messages, tools, prompt=True))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, **AS_IT_IS)["input_ids"]
        return ids

    def _marked(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.text(messages, tools)  # whose errors are sentences
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [tuple(span) for span in spans[0]]

    def _learn_form(self) -> _Form:
        answer = chr(_LAST_MARK)
        question = [{"role": "user", "content": "x"}]
        prompt = self.text(question, prompt=True)
        before, _, after = self.text([*question, {"role": "assistant", "content": answer}]).partition(answer)
        ends = [i for i in self._encode(after) if i in self.tokenizer.added_tokens_decoder]
        if not ends:
            raise RuntimeError(
                f"the chat template writes {after!r} behind an answer, which is no single token of this tokenizer, so "
                "that a model would not learn to stop; take another template, such as task.chat_template=zephyr, or "
                "add the token"
            )
        end = self.tokenizer.convert_ids_to_tokens(ends[0])
        surplus = len(prompt) - _shared(prompt, before)
        return _Form(prompt, surplus, after.partition(end)[0].strip(), end, int(ends[0]))

    def _knows_tools(self) -> bool:
        question = [{"role": "user", "content": "x"}]
        tool = {"type": "function", "function": {"name": "x", "description": "x", "parameters": {"type": "object"}}}
        return self.text(question, [tool]) != self.text(question)

    def _places(self, text: str, messages: list[Message], tools: Any) -> list[Span]:
        """Where in the text each message's mark would stand, first and last."""
        if any(_FIRST_MARK <= ord(c) <= _LAST_MARK for c in text):
            raise ValueError("has private characters (U+F0000 and above), which are needed to tell the turns apart")
        for only in (None, "assistant"):  # some templates look at how a user's message begins and ends
            marks = [chr(_FIRST_MARK + i) if only in (None, m["role"]) else "" for i, m in enumerate(messages)]
            rendered = self.text([_with_mark(m, mark) for m, mark in zip(messages, marks, strict=True)], tools)
            found: dict[str, list[int]] = {mark: [] for mark in marks if mark}
            kept = 0
            for character in rendered:
                if character in found:
                    found[character].append(kept)
                else:
                    kept += 1
            if kept == len(text) and text == "".join(c for c in rendered if c not in found):
                break
        else:
            raise ValueError(
                "has turns that cannot be told apart in what the chat template makes of them; take a template that "
                "marks answers with {% generation %}"
            )
        for number, (message, mark) in enumerate(zip(messages, marks, strict=True), start=1):
            if mark and not found[mark] and message["content"].strip() + str(message.get("tool_calls", "")):
                self._say_left_out(message, number)
        return [(min(found[m]), max(found[m])) if m and found[m] else (-1, -1) for m in marks]

    def _say_left_out(self, message: Message, number: int) -> None:
        if message["role"] == "system":  # Mistral's writes it before a question that is yet to be answered only
            warnings.warn(
                "the chat template leaves the system prompt out of conversations that end with an answer: it is not "
                "learnt from; put it into the first user's turn, or take another template",
                stacklevel=2,
            )
            return
        what = "the tool calls" if "tool_calls" in message else "the text"
        raise ValueError(
            f"has {what} of message {number} (role {message['role']!r}) left out by the chat template; take a template "
            "that knows it"
        )

    def _start(self, text: str, before: list[Message], tools: Any, after: int, place: int) -> int:
        """Where the answer at ``place`` begins: behind what the template writes to ask for it."""
        try:
            prompt = self.text(before, tools, prompt=True)
        except ValueError:  # nothing before it, or too little to be a conversation
            prompt = self._form.prompt
        prompt = prompt[: len(prompt) - self._form.surplus]
        if after <= len(prompt) <= place and text.startswith(prompt):
            return len(prompt)
        # earlier turns read otherwise in the whole conversation, but what comes just before the answer does not
        best, start = 0, -1
        for end in range(after, place + 1):
            same = _shared(text[:end][::-1], prompt[::-1])
            if same > best:
                best, start = same, end
        if not prompt[len(prompt) - best :].strip():
            raise ValueError(
                "has an answer whose beginning cannot be found in what the chat template makes of it; take a template "
                "that marks answers with {% generation %}"
            )
        return start

    def _end(self, text: str, place: int, calls_tools: bool) -> int:
        """Behind the token that ends the answer whose text ends at ``place``."""
        end = text.find(self._form.end, place)
        if end < 0 or not (calls_tools or text[place:end].strip() == self._form.closing):
            raise ValueError(
                f"has an answer that the chat template does not end with {self._form.end!r} as others; take a template "
                "that marks answers with {% generation %}"
            )
        return end + len(self._form.end)


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _with_mark(message: Message, mark: str) -> Message:
    """The message with a mark behind its last word, or in the name of the last tool that it calls."""
    if "tool_calls" in message:  # a text before them may be no more than a thought
        *others, call = message["tool_calls"]
        named = {**call["function"], "name": call["function"]["name"] + mark}
        return {**message, "tool_calls": [*others, {**call, "function": named}]}
    said = message["content"].rstrip()
    return {**message, "content": said + mark + message["content"][len(said) :]} if said else message
