"""What the JSON files beside a tokenizer say, and what we write into them.

Special tokens are named in four places, and models in the wild use any of them: as strings or
objects in tokenizer_config.json and special_tokens_map.json, as ids in config.json, and in the
SentencePiece model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json
from llamapro_jax.hf.sentencepiece_model import NORMAL, SentencePieceModel

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def optional_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object; get it again.")
    return value


def content_of(token: Any) -> str | None:
    """A token as files write it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def special_id(
    name: str,
    directory: Path,
    engine: tokenizers.Tokenizer,
    model: SentencePieceModel | None,
) -> int | None:
    """The id of `name` ("bos", "eos" or "pad"), None where the model has none.

    Raises:
      UserError: BOS or EOS is named but not in the vocabulary.
    """
    key = f"{name}_token"
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        values = optional_json(directory / file)
        if key not in values:
            continue
        token = content_of(values[key])
        if token is None:
            return None  # the model says that it has none
        if not isinstance(token, str):
            raise UserError(
                f"{directory / file}: {key} is a {type(token).__name__}; it must be a string, or "
                "an object whose `content` is one."
            )
        index = engine.token_to_id(token)
        if index is None and name != "pad":
            raise UserError(
                f"{directory / file}: {key} is {token!r}, which is not in the vocabulary. Correct "
                "it there, or give the token an id in added_tokens.json."
            )
        return index
    index = optional_json(directory / "config.json").get(f"{name}_token_id")
    if isinstance(index, list):  # several ends; the first is the one to write
        index = index[0] if index else None
    if isinstance(index, int) and index >= 0 and engine.id_to_token(index) is not None:
        return index
    return getattr(model, f"{name}_id") if model is not None else None


def added_tokens(directory: Path, model: SentencePieceModel) -> list[dict[str, Any]]:
    """The tokens that the files beside a SentencePiece model add to it, in order of id.

    Entries for its own special pieces are left out: the model has said what they are.
    """
    config = optional_json(directory / "tokenizer_config.json")
    special_map = optional_json(directory / "special_tokens_map.json")
    special = {content_of(values.get(key)) for key in NAMED for values in (config, special_map)}
    for values in (config, special_map):
        special |= {content_of(t) for t in values.get("additional_special_tokens") or []}
    entries: dict[int, dict[str, Any]] = {}
    for content, index in optional_json(directory / "added_tokens.json").items():
        entries[index] = {"id": index, "content": content, "special": content in special}
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        entries[int(index)] = {**entry, "id": int(index)}

    size = len(model.pieces)
    ids = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    for index, entry in entries.items():
        content = entry["content"]
        if index < size and ids.get(content) != index or index >= size and content in ids:
            raise UserError(
                f"{directory}: the added token {content!r} has id {index}, which is not what "
                "tokenizer.model says. Take all tokenizer files from one model."
            )
    beyond = sorted(index for index in entries if index >= size)
    if beyond != list(range(size, size + len(beyond))):
        raise UserError(
            f"{directory}: the added tokens have ids {beyond[:5]}, but must follow the {size} "
            "pieces of tokenizer.model without a gap. Take all tokenizer files from one model."
        )
    return [
        entries[index]
        for index in sorted(entries)
        if index >= size or model.pieces[index][2] == NORMAL
    ]


def read_template(path: Path) -> str:
    """The chat template in a file. Raises UserError when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}).") from None


def chat_template(directory: Path) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json (of several, the default)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_template(path)
    path = directory / "tokenizer_config.json"
    template = optional_json(path).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(
            f"{path}: chat_template is a {type(template).__name__}; it must be a string, or a list "
            "of objects with `name` and `template`."
        )
    return template


def written_special_tokens_map(directory: Path, named: dict[str, str]) -> dict[str, Any]:
    """special_tokens_map.json: what `directory` has, and `named`, e.g. {"bos_token": "<s>"}."""
    given = optional_json(directory / "special_tokens_map.json")
    return _older_names({key: value for key, value in given.items() if value is not None} | named)


def written_config(
    directory: Path,
    named: dict[str, str],
    added: list[dict[str, Any]],
    template: str | None,
) -> dict[str, Any]:
    """tokenizer_config.json for `write_tokenizer`; keys of `directory`'s own are kept.

    Args:
      named: `bos_token` and its like, as plain strings, which every reader takes.
      added: `added_tokens` of tokenizer.json.
      template: the chat template.
    """
    config = _older_names(optional_json(directory / "tokenizer_config.json"))
    config.pop("auto_map", None)  # names code to run; the class below needs none
    config.setdefault("add_bos_token", "bos_token" in named)
    config.setdefault("add_eos_token", False)
    config.setdefault("clean_up_tokenization_spaces", False)
    # Else transformers 4 returns token_type_ids, which `generate` of a LLaMA refuses.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    config["added_tokens_decoder"] = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in added
    }
    config |= named
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template is not None and not isinstance(config.get("chat_template"), list):
        config["chat_template"] = template
    return config


def _older_names(values: dict[str, Any]) -> dict[str, Any]:
    """A list in `extra_special_tokens`, a key of transformers 5, under its older name."""
    if not isinstance(values.get("extra_special_tokens"), list):
        return values
    kept = {key: value for key, value in values.items() if key != "extra_special_tokens"}
    listed = kept.get("additional_special_tokens") or []
    extra = [token for token in values["extra_special_tokens"] if token not in listed]
    return {**kept, "additional_special_tokens": listed + extra} if listed + extra else kept
