"""Tokenizers as they lie beside a Hugging Face model: load, use, write, train.

A `tokenizer.json` is used as it is, through the `tokenizers` library. `transformers` is left out
on purpose: its `LlamaTokenizer` of version 5 drops the normalizer of the file and gives other ids
than SentencePiece for text with a leading space. With only a SentencePiece `tokenizer.model`
(TencentARC/LLaMA-Pro-8B is such a one) an equal `tokenizer.json` is built from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llamapro_jax.errors import UserError
from llamapro_jax.files import atomic_write, read_json, write_json
from llamapro_jax.hf.sentencepiece_model import (
    read_sentencepiece,
    tokenizer_json,
    train_sentencepiece,
)
from llamapro_jax.hf.tokenizer_config import (
    added_tokens,
    chat_template,
    optional_json,
    special_id,
    written_config,
    written_special_tokens_map,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DECIDING_FILES = ("tokenizer.json", "tokenizer.model")  # one of these makes a tokenizer
# A noncharacter of Unicode, which no text to be exchanged may hold. See `encode_with_offsets`.
TOKEN_MARK = "\U0010ffff"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    `json_text` is the whole of `tokenizer.json`; ids follow from it alone. `source` is the
    directory it was loaded from. `bos_id`, `eos_id`, `pad_id` are None where the model has none.
    """

    json_text: str = field(repr=False)
    source: Path
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # The fields alone: a pickled engine forgets `encode_special_tokens`.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def encode(
        self, text: str, *, bos: bool = True, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """The ids of `text`.

        Args:
          bos: put BOS first, once: not when the text itself begins with it, and not when the
            model has none. What the file's own post-processor would add is never added.
          eos: put EOS last.
          allow_special: read `</s>` and its like in the text as the special token. Off, they are
            plain characters, so that data cannot end a document or open a chat turn. Added
            tokens that are not marked special are always read as tokens.

        Raises:
          UserError: `eos` is asked of a tokenizer that has none.
        """
        return self.encode_batch([text], bos=bos, eos=eos, allow_special=allow_special)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        bos: bool = True,
        eos: bool = False,
        allow_special: bool = False,
    ) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if eos and self.eos_id is None:
            raise UserError(
                f"{self.source}: the tokenizer names no end-of-sequence token; set eos_token in "
                "its tokenizer_config.json."
            )
        engine = self._with_special if allow_special else self._plain
        try:
            batch = engine.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self.source}: the tokenizer cannot encode a text ({error}); download its files "
                "again."
            ) from None
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        rows = []
        for encoding in batch:
            ids = encoding.ids
            head = [self.bos_id] if bos and self.bos_id is not None else []
            rows.append((ids if head and ids[:1] == head else head + ids) + tail)
        return rows

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and where the characters of each begin and end in it.

        A special token is written `marked(token_id)`; the same token spelled out (`</s>`) is plain
        characters, whatever it merges with. So one text can hold both. Otherwise the ids are
        those of `encode(text, bos=False, allow_special=True)`.
        """
        engine, ids = self._with_marked
        encoding = engine.encode(text, add_special_tokens=False)
        return [ids.get(index, index) for index in encoding.ids], encoding.offsets

    def marked(self, token_id: int) -> str:
        """How a special token is written for `encode_with_offsets`."""
        return f"{TOKEN_MARK}{token_id}{TOKEN_MARK}"

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder to which ids are given one by one as they are generated."""
        return StreamDecoder(self, skip_special)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included. May exceed the model's rows."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Content -> id of the tokens that `decode` skips."""
        added = self._plain.get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items()) if token.special}

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `unk_token` and `pad_token`, those which the model has."""
        unknown = json.loads(self.json_text)["model"].get("unk_token")
        named = {
            "bos_token": self.token_of(self.bos_id),
            "eos_token": self.token_of(self.eos_id),
            "unk_token": unknown if isinstance(unknown, str) else None,
            "pad_token": self.token_of(self.pad_id),
        }
        return {key: token for key, token in named.items() if token is not None}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of what decides ids: vocabulary, merges, normalizer, added tokens, and
        the ids of BOS and EOS. The chat template and the decoder are not part of it."""
        content = json.loads(self.json_text)
        keys = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        parts = {key: content.get(key) for key in keys}
        merges = parts["model"].get("merges")
        if merges:  # "a b" in older files, ["a", "b"] in newer ones
            merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
            parts["model"] = {**parts["model"], "merges": merges}
        parts["bos"], parts["eos"] = self.bos_id, self.eos_id
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def token_of(self, token_id: int | None) -> str | None:
        """The string of one id; None for None and for ids outside the vocabulary."""
        return None if token_id is None else self._plain.id_to_token(token_id)

    @cached_property
    def _plain_json(self) -> str:
        """`json_text` without merges that build a special token from its characters.

        SentencePiece builds none, but a file that others converted may.
        """
        content = json.loads(self.json_text)
        added = content.get("added_tokens") or []
        special = {token["content"] for token in added if token.get("special")}
        merges = content["model"].get("merges") or []
        joined = (m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in merges)
        kept = [merge for merge, token in zip(merges, joined, strict=True) if token not in special]
        if len(kept) == len(merges):
            return self.json_text
        content["model"]["merges"] = kept
        return json.dumps(content)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        engine = _engine(self._plain_json, self.source / "tokenizer.json")
        engine.encode_special_tokens = True  # encode them like any other characters
        return engine

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return _engine(self.json_text, self.source / "tokenizer.json")

    @cached_property
    def _with_marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """An engine that knows special tokens by their marks alone, and its ids that differ."""
        content = json.loads(self._plain_json)
        content |= {"added_tokens": [], "post_processor": None}
        engine = _engine(json.dumps(content), self.source / "tokenizer.json")
        ids = {}
        for index, token in sorted(self._plain.get_added_tokens_decoder().items()):
            if token.special:
                token = tokenizers.AddedToken(
                    self.marked(index), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
                )
            engine.add_tokens([token])
            ids[engine.token_to_id(token.content)] = index
        return engine, ids


class StreamDecoder:
    """Pieces of text as ids come in; joined, they are what `decode` gives for all the ids.

    A character whose bytes are several tokens comes out with its last token. Where the ids are
    not UTF-8, the number of U+FFFD may differ from that of `decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special=skip_special)
        self._context: list[int] = []  # what was last given out: it keeps the space before a word
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain with this id, often empty within a character."""
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is left when no id follows: an unfinished character becomes U+FFFD."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._context, self._pending = self._pending, []
        return text


def _engine(json_text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        engine = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{path}: cannot be read by tokenizers {tokenizers.__version__} ({error}). Download "
            "it again, or upgrade the tokenizers package."
        ) from None
    engine.no_truncation()  # some files carry the settings of their last use
    engine.no_padding()
    return engine


def find_tokenizer(directory: str | Path) -> bool:
    """Whether `load_tokenizer(directory)` would find one. Nothing is read."""
    return any((Path(directory) / name).is_file() for name in _DECIDING_FILES)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in `directory`: its `tokenizer.json`, else one built from `tokenizer.model`.

    BOS, EOS and pad are what tokenizer_config.json says, else special_tokens_map.json, else the
    ids in config.json (LLaMA 2's layouts all occur in the wild), else those of tokenizer.model.

    Raises:
      UserError: neither file is there, one cannot be read, or BOS or EOS is not in the vocabulary.
    """
    directory = Path(directory)
    if not find_tokenizer(directory):
        raise UserError(
            f"{directory}: has no tokenizer (looked for {' and '.join(_DECIDING_FILES)}). Copy "
            "these files, and tokenizer_config.json, from the model this one was made from."
        )
    model = None
    json_path = directory / "tokenizer.json"
    if json_path.is_file():
        read_json(json_path)  # for its message, should the file be malformed
        json_text = json_path.read_bytes().decode("utf-8")
    else:
        model = read_sentencepiece(directory / "tokenizer.model")
        content = tokenizer_json(model, added_tokens(directory, model))
        json_text = json.dumps(content, ensure_ascii=False)
    engine = _engine(json_text, json_path)
    return Tokenizer(
        json_text=json_text,
        source=directory,
        bos_id=special_id("bos", directory, engine, model),
        eos_id=special_id("eos", directory, engine, model),
        pad_id=special_id("pad", directory, engine, model),
        chat_template=chat_template(directory),
    )


def write_tokenizer(tokenizer: Tokenizer | str | Path, destination: str | Path) -> list[str]:
    """Writes a tokenizer into `destination` as transformers 4 and 5 and llama.cpp all read it.

    `tokenizer.json` to the byte, `tokenizer.model` where there is one, and a
    `tokenizer_config.json` that keeps every key it does not have to change: the class becomes
    `PreTrainedTokenizerFast` (the LLaMA classes of transformers 5 give other ids), and lists in
    `extra_special_tokens` become `additional_special_tokens` (else transformers 4 fails).

    Returns: the names of the files written.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    destination, source = Path(destination), tokenizer.source
    content = json.loads(tokenizer.json_text)
    named = tokenizer.named_tokens
    files: dict[str, str | bytes | dict[str, Any]] = {
        "tokenizer.json": tokenizer.json_text,
        "special_tokens_map.json": written_special_tokens_map(source, named),
        "tokenizer_config.json": written_config(
            source, named, content.get("added_tokens") or [], tokenizer.chat_template
        ),
    }
    for name in ("tokenizer.model", "added_tokens.json"):
        if (source / name).is_file():
            files[name] = (source / name).read_bytes()
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template
    for name, value in files.items():
        if isinstance(value, dict):
            write_json(destination / name, value)
        else:
            atomic_write(destination / name, value)
    return list(files)


def with_template(directory: str | Path, template: str) -> None:
    """Makes `template` the chat template of the tokenizer whose files are in `directory`.

    It is written into chat_template.jinja and tokenizer_config.json, and takes the place of
    whatever was there; `write_tokenizer` and transformers take it along from there.
    """
    directory = Path(directory)
    config = optional_json(directory / "tokenizer_config.json")
    write_json(directory / "tokenizer_config.json", {**config, "chat_template": template})
    atomic_write(directory / "chat_template.jinja", template)


def train_tokenizer(texts: Iterable[str], vocab_size: int, destination: str | Path) -> Tokenizer:
    """Trains a tokenizer of LLaMA's kind and writes all its files into `destination`.

    SentencePiece BPE with byte fallback; `<unk>`, `<s>`, `</s>` are 0, 1, 2 and the 256 bytes
    follow. Both `tokenizer.model` and the equal `tokenizer.json`; the same texts, the same bytes.

    Raises:
      UserError: as `train_sentencepiece` does.
    """
    destination = Path(destination)
    atomic_write(destination / "tokenizer.model", train_sentencepiece(texts, vocab_size))
    (destination / "tokenizer.json").unlink(missing_ok=True)
    write_tokenizer(destination, destination)
    return load_tokenizer(destination)
