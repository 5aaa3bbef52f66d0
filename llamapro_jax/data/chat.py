"""Conversations to token ids, and which of them the assistant says."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from llamapro_jax.data.conversations import Message, messages_of
from llamapro_jax.data.readers.documents import BadRecord
from llamapro_jax.data.templates import CLOSE, LLAMA_PRO, OPEN, TemplateError, render
from llamapro_jax.errors import UserError
from llamapro_jax.hf.tokenizer import TOKEN_MARK, Tokenizer
from llamapro_jax.hf.tokenizer_config import read_template

__all__ = ["LLAMA_PRO", "BadRecord", "ChatTemplate", "Message", "messages_of"]

log = logging.getLogger(__name__)

TEMPLATES = {"llama_pro": LLAMA_PRO}
# Goes into `</s>` and its like in a message, so that they are not taken for the template's.
_BREAK = "\U0010fffe"
_RESERVED = re.compile(f"[{OPEN}{CLOSE}{_BREAK}{TOKEN_MARK}\ud800-\udfff]")
_PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with a tokenizer.

    text: the template in Jinja. Where the tokenizer has a begin token that the template does not
    write, the token is put in front, so that every conversation begins with it, here and wherever
    the exported template is used.
    """

    name: str
    text: str = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)

    @classmethod
    def load(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """A template to train with.

        name: `llama_pro`; `tokenizer`, the tokenizer's own; or the path of a file with one.

        Raises:
          UserError: there is none of that name, it is malformed, or it does not say with
            `{% generation %}` what the assistant's part is.
        """
        if name in TEMPLATES:
            if tokenizer.eos_id is None:
                raise UserError(
                    f"{tokenizer.source}: the tokenizer names no end-of-sequence token, with which "
                    f"the chat template {name} ends an answer; set eos_token in its "
                    "tokenizer_config.json."
                )
            template = cls(name, TEMPLATES[name], tokenizer)._checked()
        elif name == "tokenizer":
            template = cls.of_tokenizer(tokenizer)
        elif Path(name).is_file():
            template = cls(name, read_template(Path(name)), tokenizer)._checked()
        else:
            raise UserError(
                f"template is {name!r}, which is no file; it must be {', '.join(TEMPLATES)}, "
                "tokenizer (the tokenizer's own), or the path of a file with a Jinja template."
            )
        template._check_trainable()
        return template

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The tokenizer's own template, to talk to the model. Raises UserError without one."""
        if tokenizer.chat_template is None:
            raise UserError(
                f"{tokenizer.source}: the tokenizer has no chat template (chat_template.jinja, or "
                "chat_template in tokenizer_config.json). Put the model's there, tune it on "
                "conversations with `template: llama_pro`, or talk to it without --chat."
            )
        return cls(f"of {tokenizer.source}", tokenizer.chat_template, tokenizer)._checked()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the template."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def end_id(self) -> int | None:
        """The special token that ends an answer; None where the template writes none."""
        special = set(self.tokenizer.special_tokens.values()) - {self.tokenizer.bos_id}
        ids = self.encode(_PROBE)[0].tolist()
        return next((index for index in reversed(ids) if index in special), None)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation with the assistant's turn opened. Raises as `encode` does."""
        return self._encode(messages, True)[0]

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, int32 [n], and which are the assistant's, bool [n].

        A token counts when any of its characters does. Special tokens are those that the template
        writes; spelled out in a message (`</s>`) they are plain characters, which end no turn.

        Raises:
          BadRecord: the template refuses the conversation, or a message holds what is no text (a
            surrogate, or one of four noncharacters of Unicode that are used in here).
        """
        ids, offsets, spans = self._encode(messages, False)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask |= (begins < stop) & (ends > start)
        return np.array(ids, np.int32), mask

    def fit(
        self, messages: Sequence[Message], sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """`encode` of as many turns as fit into `sequence_length` tokens, and how many do not.

        The last turn is an assistant's. None when not even the first exchange fits.
        """
        tokens, mask = self.encode(messages)
        if len(tokens) <= sequence_length:
            return tokens, mask, 0
        ends = [n for n, turn in enumerate(messages, start=1) if turn["role"] == "assistant"]
        best = None
        low, high = 0, len(ends) - 1  # ends[:low] fit, ends[high:] do not
        while low < high:
            middle = (low + high) // 2
            tokens, mask = self.encode(messages[: ends[middle]])
            if len(tokens) <= sequence_length:
                best, low = (tokens, mask, len(messages) - ends[middle]), middle + 1
            else:
                high = middle
        return best

    def _encode(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """Ids, their offsets, and the spans of the assistant's characters in the same text."""
        text, spans = self._marked(self._render(messages, add_generation_prompt))
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        return ids, offsets, spans

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text with marks round the assistant's parts and breaks in what messages spell."""
        for turn in messages:
            reserved = _RESERVED.search(turn["content"])
            if reserved:
                raise BadRecord(
                    f"a {turn['role']} turn holds U+{ord(reserved[0]):04X}, which is no character"
                )
        broken = [{**turn, "content": self._broken(turn["content"])} for turn in messages]
        try:
            return render(self.text, broken, self.tokenizer.named_tokens, add_generation_prompt)
        except TemplateError as error:
            raise BadRecord(f"the chat template fails: {str(error)!r}") from error

    @cached_property
    def _special(self) -> str:
        """A pattern of the special tokens, the longest first."""
        tokens = sorted(self.tokenizer.special_tokens, key=lambda text: (-len(text), text))
        if not tokens:
            return "(?!)"
        # Looked at before hundreds of alternatives, the first character makes it 80 times faster.
        first = "".join(re.escape(character) for character in sorted({t[0] for t in tokens}))
        return f"(?=[{first}])(?:{'|'.join(map(re.escape, tokens))})"

    @cached_property
    def _in_content(self) -> re.Pattern[str]:
        return re.compile(f"(?s)(?={self._special})(.)")

    @cached_property
    def _in_rendered(self) -> re.Pattern[str]:
        return re.compile(f"[{OPEN}{CLOSE}{_BREAK}]|{self._special}(?!{_BREAK})")

    def _broken(self, content: str) -> str:
        """The content with a break in each special token that is spelled in it."""
        return self._in_content.sub(rf"\1{_BREAK}", content)

    def _marked(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """The text for `encode_with_offsets`, and the spans in it that the assistant says."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length, opened, done = 0, 0, 0
        for found in self._in_rendered.finditer(rendered):
            part, what = rendered[done : found.start()], found[0]
            if what not in (OPEN, CLOSE, _BREAK):
                part += self.tokenizer.marked(self.tokenizer.special_tokens[what])
            parts.append(part)
            length += len(part)
            done = found.end()
            if what == OPEN:
                opened = length
            elif what == CLOSE:
                spans.append((opened, length))
        parts.append(rendered[done:])
        return "".join(parts), spans

    def _checked(self) -> ChatTemplate:
        """Itself, beginning with the begin token. Raises UserError when it cannot be used."""
        try:
            ids = self.encode(_PROBE)[0]
        except BadRecord as error:
            raise UserError(
                f"the chat template {self.name} cannot render a question and an answer ({error}); "
                "correct it."
            ) from None
        bos = self.tokenizer.bos_id
        if bos is None or ids[:1].tolist() == [bos]:
            return self
        return replace(self, text="{{ bos_token }}" + self.text)

    def _check_trainable(self) -> None:
        """Raises UserError when the template does not say what the assistant's part is."""
        text, spans = self._marked(self._render(_PROBE, False))
        if not any(_PROBE[1]["content"] in text[start:stop] for start, stop in spans):
            raise UserError(
                f"the chat template {self.name} does not say which part is the assistant's: put "
                "{% generation %} before and {% endgeneration %} after its words and end token, "
                "or take template llama_pro."
            )
        ids, mask = self.encode(_PROBE)
        ends = set(self.tokenizer.special_tokens.values())
        if ends.isdisjoint(ids[mask].tolist()):
            log.warning(
                "the chat template %s: no end token is within {%% generation %%}, so a model that "
                "is trained with it does not learn to stop",
                self.name,
            )
