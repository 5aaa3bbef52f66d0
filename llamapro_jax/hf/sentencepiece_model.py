"""SentencePiece models (`tokenizer.model`): read, turn into a `tokenizer.json`, train.

LLaMA 2 ships a SentencePiece BPE with byte fallback. Everything here works on that kind; other
kinds are refused by name. The file is a protocol buffer of three fields that matter, read here
directly so that no `protobuf` installation (and none of its version conflicts) is needed.
Field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says: pieces in order of id, and how text is prepared."""

    pieces: tuple[tuple[str, float, int], ...]  # (piece, score, type)
    byte_fallback: bool
    add_dummy_prefix: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message; groups do not occur in these files."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            if shift > 63:  # no field is that long, and an endless one takes an endless time
                raise ValueError("a number of more than 64 bits")
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value: int | bytes = varint()
        else:
            size = {1: 8, 2: None, 5: 4}[kind]
            if size is None:
                size = varint()
            value = data[position : position + size]
            position += size
            if len(value) != size:
                raise IndexError("truncated")
        yield key >> 3, value


def _message(data: bytes) -> dict[int, Any]:
    return dict(_fields(data))


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = _message(data)
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return fields[1].decode("utf-8"), score, fields.get(3, NORMAL)


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """The SentencePiece BPE in `path`.

    Raises:
      UserError: the file is not a SentencePiece model (LLaMA 3's `tokenizer.model` is not), or
        is of a kind whose ids a `tokenizer.json` built here would not reproduce.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        parts = list(_fields(data))
        pieces = tuple(_piece(value) for number, value in parts if number == 1)
        trainer = next((_message(value) for number, value in parts if number == 2), {})
        normalizer = next((_message(value) for number, value in parts if number == 3), {})
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        pieces, trainer, normalizer = (), {}, {}
    if not pieces:
        raise UserError(
            f"{path}: is not a SentencePiece model (truncated, a Git LFS pointer, or the tiktoken "
            "file of LLaMA 3). Download it again, or put the model's tokenizer.json beside it."
        )
    _require_llama_kind(path, pieces, trainer, normalizer)

    def special(field: int, default: int) -> int | None:
        value = trainer.get(field, default)
        value = value - (1 << 64) if value >= 1 << 63 else value
        return value if 0 <= value < len(pieces) else None

    unknown = [index for index, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    return SentencePieceModel(
        pieces=pieces,
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        unk_id=unknown[0] if unknown else 0,
        bos_id=special(41, 1),
        eos_id=special(42, 2),
        pad_id=special(43, -1 + (1 << 64)),
    )


def _require_llama_kind(
    path: Path,
    pieces: tuple[tuple[str, float, int], ...],
    trainer: dict[int, Any],
    normalizer: dict[int, Any],
) -> None:
    model_type = trainer.get(3, 1)
    problems = {
        f"its model_type is {_MODEL_TYPES.get(model_type, model_type)!r}, not 'bpe'": (
            model_type != _BPE
        ),
        "it normalizes text (precompiled_charsmap)": bool(normalizer.get(2)),
        "it removes extra whitespace": bool(normalizer.get(4, 1)),
        "it does not escape whitespace": not normalizer.get(5, 1),
        "it treats whitespace as a suffix": bool(trainer.get(24, 0)),
        "it has unused pieces": any(kind == UNUSED for _, _, kind in pieces),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UserError(
            f"{path}: is not a SentencePiece model of LLaMA's kind: {'; '.join(found)}. Put the "
            "model's tokenizer.json beside it: that one is used as it is."
        )


def merges_from_scores(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges, most urgent first, that make a rank-based BPE act like SentencePiece.

    SentencePiece merges the neighbours whose union has the highest score. Only normal pieces are
    built: no merge may lead to `</s>` or `<0x0A>`, or plain text could become a control token.
    """
    ids = {piece: index for index, (piece, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    ranked = sorted(ids, key=lambda piece: (-model.pieces[ids[piece]][1], ids[piece]))
    merges = []
    for piece in ranked:
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _template(bos: tuple[str, int] | None) -> dict[str, Any] | None:
    """The post-processor by which other readers put BOS before a text."""
    if bos is None:
        return None
    token, token_id = bos

    def sequence(*names: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        for type_id, name in enumerate(names):
            items.append({"SpecialToken": {"id": token, "type_id": type_id}})
            items.append({"Sequence": {"id": name, "type_id": type_id}})
        return items

    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": sequence("A", "B"),
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _symbols(model: SentencePieceModel) -> dict[int, str]:
    """Id -> user-defined symbol, of those that SentencePiece can find.

    It looks for them where a space is SPACE already; `normalized` makes `tokenizers` do the same.
    """
    return {
        index: piece
        for index, (piece, _, kind) in enumerate(model.pieces)
        if kind == USER_DEFINED and " " not in piece
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    """A space before the text, where the model wants one, and each space as SPACE."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not model.add_dummy_prefix:
        return [replace]
    symbols = [re.escape(piece) for piece in _symbols(model).values()]
    if not symbols:
        return [{"type": "Prepend", "prepend": SPACE}, replace]
    # `tokenizers` normalizes the symbols too before it looks for them in the normalized text:
    # only the text may get the prefix, and a text that is a symbol alone cannot be told from one.
    start = rf"\A(?!(?:{'|'.join(symbols)})\z)(?=[\s\S])"
    return [{"type": "Replace", "pattern": {"Regex": start}, "content": SPACE}, replace]


def tokenizer_json(
    model: SentencePieceModel, added: Iterable[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A `tokenizer.json` that gives SentencePiece's ids, in the layout LLaMA 2's own has.

    One text differs: a user-defined symbol and nothing else lacks the piece of the dummy prefix.

    Args:
      added: entries of `added_tokens` beyond the model's pieces, `id` and `content` at least.
    """
    entries = {
        index: _added_token(index, piece, special=True)
        for index, (piece, _, kind) in enumerate(model.pieces)
        if kind in (UNKNOWN, CONTROL)
    }
    for index, piece in _symbols(model).items():
        entries[index] = _added_token(index, piece, normalized=True)
    for entry in added:
        entries[entry["id"]] = _added_token(**entry)
    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    bos = None if model.bos_id is None else (model.pieces[model.bos_id][0], model.bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [entries[index] for index in sorted(entries)],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": _template(bos),
        "decoder": {
            "type": "Sequence",
            "decoders": decoders + [strip] if model.add_dummy_prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges_from_scores(model)],
        },
    }


def _added_token(
    id: int,
    content: str,
    special: bool = False,
    normalized: bool = False,
    single_word: bool = False,
    lstrip: bool = False,
    rstrip: bool = False,
    **_: Any,
) -> dict[str, Any]:
    return {
        "id": id,
        "content": content,
        "single_word": single_word,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": normalized,
        "special": special,
    }


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of a `tokenizer.model` trained on `texts` with LLaMA 2's settings.

    BPE with byte fallback, no normalization, whitespace kept, digits split; ids 0, 1, 2 are
    `<unk>`, `<s>`, `</s>` and the 256 bytes follow. The same texts give the same bytes.

    Raises:
      UserError: `vocab_size` has no room for the special tokens and the bytes, or the texts do
        not hold enough different strings for it.
    """
    import sentencepiece

    if vocab_size < 300:
        raise UserError(
            f"vocab_size={vocab_size}: 3 special tokens, 256 bytes and the alphabet need at "
            "least 300; choose some thousands."
        )
    lines = (line for text in texts for line in text.splitlines() if line)
    first = next(lines, None)
    if first is None:
        raise UserError("No text to train a tokenizer on: every text is empty.")

    def sentences() -> Iterator[str]:
        yield first
        yield from lines

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=2**24,  # bytes; longer lines would be left out silently
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"vocab_size={vocab_size}: SentencePiece could not train on these texts ({error}). "
            "Give more text or ask for another size."
        ) from None
    return model.getvalue()
