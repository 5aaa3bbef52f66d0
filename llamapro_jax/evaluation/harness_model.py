"""Our model as lm-evaluation-harness knows models. Importing this needs the extra `eval`.

`HarnessModel` is registered in lm_eval as `llamapro`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llamapro_jax.data.chat import ChatTemplate
from llamapro_jax.data.templates import CLOSE, OPEN, TemplateError, render
from llamapro_jax.errors import UserError, nearest
from llamapro_jax.evaluation.scoring import (
    check_batch_size,
    check_max_length,
    generate_until,
    loglikelihoods,
)
from llamapro_jax.generate import DECODER_CONTEXT
from llamapro_jax.model.api import Model, load

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 256  # lm_eval's, for tasks that say nothing
_GOES_ON = "\U0001fffe"  # a noncharacter: where the text of an unfinished message ends
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LOAD_OPTIONS = tuple(inspect.signature(load).parameters)[1:]


@dataclass(frozen=True)
class Generation:
    """What a task's `generation_kwargs` ask for. temperature 0 is greedy."""

    until: tuple[str, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Generation:
        """Reads the names that lm_eval and its tasks use; warns of what has no effect here."""
        until = options.get("until") or ()
        lengths = [options[name] for name in _MAX_TOKENS if options.get(name) is not None]
        temperature = float(options.get("temperature") or 0.0)
        top_k = options.get("top_k")
        known = {"until", "do_sample", "temperature", "top_k", "top_p", *_MAX_TOKENS}
        rest = {k: v for k, v in options.items() if k not in known and (k, v) != ("num_beams", 1)}
        if rest:
            log.warning("generation_kwargs: %s have no effect on this model", rest)
        return cls(
            until=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
            max_tokens=int(lengths[0]) if lengths else DEFAULT_MAX_TOKENS,
            temperature=temperature if options.get("do_sample", True) else 0.0,
            top_k=int(top_k) if top_k else None,
            top_p=float(options.get("top_p") or 1.0),
        )


@register_model("llamapro")
class HarnessModel(TemplateLM):
    """A model under lm-evaluation-harness.

    pretrained: a loaded model, or what `llamapro_jax.load` opens, with its options (`dtype`,
    `generation`, `strength`, `allow_bin`) beside it. max_length: tokens of context and answer
    together, None for all the model's positions; what is longer loses its beginning.
    new_blocks=False: without the inserted blocks. template: of chats, as `ChatTemplate.load` takes
    it; by default the tokenizer's own.

    Special tokens written in a text (`</s>`) are read as such, as `transformers` does; what is
    generated keeps the space or indentation it begins with.

    Raises:
      UserError: a value out of range, an unknown option, a model without a tokenizer or begin
        token.
    """

    def __init__(
        self,
        pretrained: str | Model,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        new_blocks: bool = True,
        template: str = "tokenizer",
        **options: Any,
    ) -> None:
        super().__init__()
        options.pop("device", None)  # the harness always names one; JAX_PLATFORMS decides
        _check_options(options, loaded=isinstance(pretrained, Model))
        if not str(batch_size).isdecimal():
            raise UserError(f"batch_size is {batch_size!r}; it must be a number, such as 8.")
        self.batch_size = int(batch_size)
        check_batch_size(self.batch_size)
        self._template = template
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, **options)
        self.max_length = check_max_length(self.model, max_length)
        self.model.check_new_blocks(new_blocks)
        self.new_blocks = new_blocks
        self.tokenizer = self.model.require_tokenizer()
        if self.tokenizer.bos_id is None and self.tokenizer.eos_id is None:
            raise UserError(
                f"{self.tokenizer.source}: names neither a begin nor an end token, so a text "
                "without context cannot be scored; set bos_token in its tokenizer_config.json."
            )

    # --------------------------------------------------------------- texts and ids

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The id that stands for the context where there is none."""
        bos = self.tokenizer.bos_id
        return self.tokenizer.eos_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, after one begin token unless `add_special_tokens` is False."""
        bos = add_special_tokens is not False
        return self.tokenizer.encode(string, bos=bos, allow_special=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            # The end of the context and the continuation are one token: both are scored, from
            # where the ids of the whole and of the context part.
            whole = self.tok_encode(context + continuation)
            common = next(
                (
                    i
                    for i, pair in enumerate(zip(whole, context_ids, strict=False))
                    if len({*pair}) > 1
                ),
                len(whole),
            )
            context_ids, continuation_ids = whole[:common], whole[common:]
            if not continuation_ids:
                raise UserError(
                    f"the answer {continuation!r} after {context[-40:]!r} adds no token; mend the "
                    "task's doc_to_choice or doc_to_target."
                )
        return context_ids, continuation_ids

    # --------------------------------------------------------------- what tasks ask

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return loglikelihoods(
            self.model,
            pairs,
            batch_size=self.batch_size,
            max_length=self.max_length,
            new_blocks=self.new_blocks,
            progress="log-likelihoods",
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, answer) for _, context, answer in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each whole text after the begin token, in nats.

        A text that is longer than the model is cut into windows: each token is predicted once,
        and those of the last window after as many tokens as fit.
        """
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                # The begin token is the context, not a part of the text that is predicted.
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each prompt. Sampling differs with the place in `requests`."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        groups = [(Generation.of(requests[n[0]].args[1]), n) for n in alike.values()]
        for how, _ in groups:
            self.check_generation(how)
        for how, numbers in groups:
            prompts = [self.tok_encode(requests[i].args[0]) for i in numbers]
            for i, text in zip(numbers, self._generated(how, numbers, prompts), strict=True):
                texts[i] = text
        return texts

    def check_generation(self, how: Generation) -> None:
        """Raises UserError when a task wants longer texts than the model has positions for."""
        if not 1 <= how.max_tokens < self.max_length:
            raise UserError(
                f"max_gen_toks is {how.max_tokens}; it must be from 1 to {self.max_length - 1}, "
                f"for the model takes {self.max_length} tokens with the prompt. Set it in the "
                "task's generation_kwargs."
            )

    def _generated(
        self, how: Generation, numbers: Sequence[int], prompts: Sequence[list[int]]
    ) -> Iterable[str]:
        if how.temperature > 0:
            return (self._sampled(how, *one) for one in zip(numbers, prompts, strict=True))
        return generate_until(
            self.model,
            prompts,
            max_tokens=how.max_tokens,
            until=how.until,
            batch_size=self.batch_size,
            max_length=self.max_length,
            new_blocks=self.new_blocks,
            progress="texts",
        )

    def _sampled(self, how: Generation, seed: int, prompt: list[int]) -> str:
        prompt = prompt[how.max_tokens - self.max_length :]
        decoder = self.tokenizer.stream_decoder()
        for token in prompt[-DECODER_CONTEXT:]:
            decoder.push(token)
        text = ""
        for token in self.model.stream(
            prompt,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            seed=seed,
            new_blocks=self.new_blocks,
        ):
            text += decoder.push(token)
            if any(stop in text for stop in how.until):
                break
        else:
            text += decoder.flush()
        return text[: min((text.index(s) for s in how.until if s in text), default=None)]

    # --------------------------------------------------------------- chats

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self._template == "tokenizer":
            return ChatTemplate.of_tokenizer(self.tokenizer)
        return ChatTemplate.load(self._template, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What the tokenizer and the template are, for lm_eval's caches of requests."""
        return f"{self.tokenizer.fingerprint[:16]}-{self._chat.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, None where none is to be used."""
        return self._chat.text if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for the messages. Without the generation prompt the last message goes on."""
        messages = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += _GOES_ON
        try:
            text = self._rendered(messages, add_generation_prompt)
        except TemplateError as error:
            rest = [message for message in messages if message["role"] != "system"]
            if len(rest) == len(messages):
                raise UserError(f"the chat template fails: {error}") from None
            # As the harness does for templates that know no such role.
            log.warning("the chat template fails (%s); without the system message instead", error)
            text = self._rendered(rest, add_generation_prompt)
        return text.partition(_GOES_ON)[0]

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        tokens = self.tokenizer.named_tokens
        text = render(self._chat.text, messages, tokens, add_generation_prompt)
        return text.replace(OPEN, "").replace(CLOSE, "")


def _check_options(options: Mapping[str, Any], loaded: bool) -> None:
    for name in options:
        if name not in _LOAD_OPTIONS:
            raise UserError(
                f"model_args: {name!r} is no option of this model."
                + (nearest(name, _LOAD_OPTIONS) or f" Known: {', '.join(_LOAD_OPTIONS)}.")
            )
    if options and loaded:
        raise UserError(f"{', '.join(options)}: the model is loaded already; load it with them.")
