from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamapro_jax.data.readers.documents import Content, input_files, texts
from llamapro_jax.errors import UserError


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def text_files(path: Path) -> list[Path]:
    return input_files(Content(str(path)))


def read_documents(file: Path) -> Iterator[str]:
    return texts(Content(str(file)))


def test_a_directory_is_read_below_and_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b/c.md", "a-b.rst", "d.jsonl", "x.bin", ".git/h.txt"):
        write(tmp_path / name, "text")
    names = [file.relative_to(tmp_path).as_posix() for file in text_files(tmp_path)]
    assert names == ["a-b.rst", "a/b/c.md", "a/z.py", "b.txt", "d.jsonl"]


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    text = " leading\r\nnew line é 😀\n\n"
    assert list(read_documents(write(tmp_path / "a.txt", text))) == [text]
    assert list(read_documents(write(tmp_path / "empty.txt", ""))) == []


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    wanted = ["one\ntwo", "line separator \u2028 inside", "é"]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in wanted]
    file = write(tmp_path / "a.jsonl", "\n\n".join([*lines, '{"text": ""}']))
    assert list(read_documents(file)) == wanted


def test_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    file = write(tmp_path / "latin.txt", b"abc\n" + "é".encode("latin1") + b" x")
    with pytest.raises(
        UserError, match=r"latin\.txt: is not UTF-8 .* at byte 4 of it\); convert it"
    ):
        list(read_documents(file))
    lines = write(tmp_path / "latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: is not UTF-8 .* at byte 10 of it\)"):
        list(read_documents(lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2: is not JSON \(.* at column 13\)"),
        ('["a"]', r"a\.jsonl:2: is a JSON list, not an object"),
        ('{"content": "a", "id": 3}', r"a\.jsonl:2: has no field 'text'; it has 'content', 'id'"),
        ("{}", r"a\.jsonl:2: has no field 'text'; it has none; set `field`"),
        ('{"text": ["a"]}', r"a\.jsonl:2: 'text' is a list, not a string"),
        (r'{"text": "\ud800"}', r"a\.jsonl:2: 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        list(read_documents(file))


def test_what_is_no_text_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt: no such file or directory"):
        text_files(tmp_path / "absent.txt")
    with pytest.raises(
        UserError, match=r"a\.pdf: a source of kind 'text' is a directory or a file that"
    ):
        text_files(write(tmp_path / "a.pdf", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no file below it ends in \.txt"):
        text_files(tmp_path / "empty")
