"""Records of chat data to one form: messages with a role and a content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamapro_jax.data.readers.documents import BadRecord

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# The question's field and the answer's. MetaMathQA has query and response, Evol CodeAlpaca
# instruction and output (and Alpaca an input beside them), GSM8K question and answer.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("question", "answer"),
)


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The conversation of one record: [{"role": ..., "content": ...}, ...].

    Read are `messages` (role, content), `conversations` (from, value: ShareGPT, WizardLM V2,
    SlimOrca) and the pairs in `PAIRS`; other fields are passed over. What comes back is an optional
    system turn, then user and assistant turns in alternation, the last one an assistant's. Left
    out are an empty system turn, assistant turns before the first user turn (a conversation of
    ShareGPT may begin in the middle) and user turns without an answer at the end.

    Raises:
      BadRecord: no conversation in the record, an unknown role, a system turn that is not first,
        two turns of one role in a row, a content that is not text, an empty assistant turn, no
        assistant turn.
    """
    if record.get("messages") is not None:  # a null is what a Parquet file has for an absent field
        turns = _turns(record["messages"], "messages", "role", "content")
    elif record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", "from", "value")
    else:
        turns = _pair(record)
    return _checked(turns)


def _turns(value: Any, field: str, role: str, content: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRecord(f"{field} is {_kind(value)}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise BadRecord(f"{field}: turn {number} is {_kind(turn)}, not an object")
        for key in (role, content):
            if not isinstance(turn.get(key), str):
                raise BadRecord(f"{field}: {key} of turn {number} is {_kind(turn.get(key))}")
        known = ROLES.get(turn[role])
        if known is None:
            raise BadRecord(
                f"{field}: {role} of turn {number} is {turn[role]!r}; it must be one of "
                f"{', '.join(ROLES)}"
            )
        turns.append({"role": known, "content": turn[content]})
    return turns


def _pair(record: Mapping[str, Any]) -> list[Message]:
    for asked, answered in PAIRS:
        if record.get(asked) is not None and record.get(answered) is not None:
            break
    else:
        pairs = ", ".join(f"{asked} and {answered}" for asked, answered in PAIRS)
        raise BadRecord(
            f"holds no conversation: neither messages, nor conversations, nor {pairs}, but "
            f"{', '.join(map(repr, record)) or 'nothing'}"
        )
    more = record.get("input") if asked == "instruction" else None
    for field, value in ((asked, record[asked]), (answered, record[answered]), ("input", more)):
        if not isinstance(value, str) and not (field == "input" and value is None):
            raise BadRecord(f"{field} is {_kind(value)}, not text")
    question = f"{record[asked]}\n\n{more}" if more else record[asked]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record[answered]},
    ]


def _checked(turns: list[Message]) -> list[Message]:
    """The turns in order and complete; see `messages_of`."""
    system = [turn for turn in turns[:1] if turn["role"] == "system"]
    first, last = len(system), len(turns)
    while first < last and turns[first]["role"] == "assistant":
        first += 1
    while first < last and turns[last - 1]["role"] == "user":
        last -= 1
    rest = turns[first:last]
    if not rest:
        raise BadRecord("no user turn with an assistant turn after it")
    for index, turn in enumerate(rest):
        number = first + index + 1
        expected = "user" if index % 2 == 0 else "assistant"
        if turn["role"] == "system":
            raise BadRecord("a system turn that is not the first turn")
        if turn["role"] != expected:
            raise BadRecord(f"two {turn['role']} turns in a row (the second is turn {number})")
        if expected == "assistant" and not turn["content"].strip():
            raise BadRecord(f"an empty assistant turn (turn {number})")
    return [turn for turn in system if turn["content"].strip()] + rest


def _kind(value: Any) -> str:
    return "absent" if value is None else f"of type {type(value).__name__}"
