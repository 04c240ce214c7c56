"""What tasks on conversations have in common: the template that writes them, and where an answer ends."""

from __future__ import annotations

from typing import Any

from lightning_peft.tasks.chat import Chat, template_text
from lightning_peft.tasks.language_model import end_of_text


class Conversing:
    """A task whose rows may be conversations.

    Attributes:
        chat_template: the template's text; None takes the tokenizer's own.
    """

    chat_template: str | None

    def __post_init__(self) -> None:
        if self.chat_template is not None:
            self.chat_template = template_text(self.chat_template)

    def tokenizer_for(self, tokenizer: Any) -> Any:
        """The tokenizer with the template that conversations get; it goes with the adapter.

        Args:
            tokenizer: a Hugging Face tokenizer of which nobody else knows.
        """
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    def _has_template(self, tokenizer: Any) -> bool:
        return self.chat_template is not None or bool(tokenizer.chat_template)

    def _chat(self, tokenizer: Any, with_tools: bool = False) -> Chat:
        """The template for conversations; a tokenizer may have another one for those with tools."""
        if not self._has_template(tokenizer):
            raise RuntimeError(
                "the data has conversations, but the tokenizer has no chat template; name one with "
                "task.chat_template=zephyr, chatml or a .jinja file"
            )
        return Chat(tokenizer, self.chat_template or tokenizer.get_chat_template(None, [{}] if with_tools else None))

    def _ends(self, tokenizer: Any) -> list[int]:
        """The tokens at which an answer that is being written ends."""
        turn = [self._chat(tokenizer).end] if self._has_template(tokenizer) else []
        return list(dict.fromkeys([*turn, *end_of_text(tokenizer)]))
