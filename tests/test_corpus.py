from __future__ import annotations

import ast
import json
import textwrap

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.quickstart import corpus
from llamapro_jax.quickstart.corpus import Document, split, strip_code


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    paths = corpus.write_corpus(tmp_path_factory.mktemp("corpus"))
    return {name: _documents(path) for name, path in paths.items()}


def _documents(path):
    documents = []
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        if "messages" in record:
            question, answer = record["messages"]
            assert (question["role"], answer["role"]) == ("user", "assistant")
            record = {"name": question["content"], "text": answer["content"]}
        documents.append(Document(**record))
    return documents


def _bytes(documents):
    return sum(len(document.text.encode()) for document in documents)


def _paragraphs(documents):
    return [" ".join(p.split()) for d in documents for p in d.text.split("\n\n") if p.strip()]


def test_the_five_texts_have_the_sizes_a_small_model_needs(written):
    assert set(written) == set(corpus.FILES)
    assert _bytes(written["prose_train"]) > 1_000_000
    assert _bytes(written["code_train"]) > 2_500_000
    assert _bytes(written["prose_heldout"]) > 50_000
    assert _bytes(written["code_heldout"]) > 150_000


def test_conversations_ask_what_a_part_of_the_library_does(written):
    train, held_out = (
        {d.name: d.text for d in written[f"chat_{s}"]} for s in ("train", "heldout")
    )
    assert len(train) > 1000 and len(held_out) > 20 and not train.keys() & held_out.keys()
    both = {**train, **held_out}
    assert both["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace")
    assert all(
        question.startswith("What does ") and answer.endswith(".")
        for question, answer in both.items()
    )
    assert not [question for question in both if "._" in question or "__" in question]


def test_no_held_out_document_or_paragraph_is_in_training(written):
    for domain in ("prose", "code"):
        held_out = written[f"{domain}_heldout"]
        training = written[f"{domain}_train"] + written["base_train"]
        assert not {d.name for d in held_out} & {d.name for d in training}
        assert not {d.text for d in held_out} & {d.text for d in training}
    train, held_out = (set(_paragraphs(written[f"prose_{s}"])) for s in ("train", "heldout"))
    assert not train & held_out


def test_the_base_text_is_all_the_prose_and_a_tenth_of_code_that_training_does_not_reuse(written):
    base_names = {d.name for d in written["base_train"]}
    assert {d.name for d in written["prose_train"]} < base_names
    code = [d for d in written["base_train"] if d.name.startswith("code/")]
    assert 0.08 < _bytes(code) / _bytes(written["base_train"]) <= 0.1
    assert not {d.name for d in code} & {d.name for d in written["code_train"]}


def test_code_is_valid_python_without_docstrings_comments_tests_or_tables(written):
    documents = written["code_train"] + written["code_heldout"]
    for document in documents:
        assert not corpus._docstring_statements(ast.parse(document.text)), document.name
    names = {d.name for d in documents}
    assert "code/json/decoder.py" in names
    assert not [n for n in names if "/test" in n or "site-packages" in n or "encodings" in n]


def test_the_same_seed_writes_the_same_bytes(tmp_path, monkeypatch):
    sources = [
        corpus.Source(f"m{i}.py", text, ast.parse(text))
        for i, text in enumerate(
            f'"""{f"What module number {i} is for. " * 12}"""\n' + f"value = {i}\n" * 50
            for i in range(30)
        )
    ]
    monkeypatch.setattr(corpus, "_library", lambda: iter(sources))
    first, again, other = (
        {name: p.read_bytes() for name, p in corpus.write_corpus(tmp_path / s, seed=seed).items()}
        for s, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first["code_heldout"] != other["code_heldout"]


def test_split_depends_on_the_name_alone():
    documents = [Document(f"m{i}.py", str(i)) for i in range(2000)]
    train, held_out = split(documents, 0.1, seed=3)
    assert len(train) + len(held_out) == 2000 and 150 < len(held_out) < 250
    _, from_half = split([Document(d.name, "other") for d in documents[::2]], 0.1, seed=3)
    assert [d.name for d in from_half] == [d.name for d in held_out if d in documents[::2]]
    assert split(documents, 0.1, seed=4)[1] != held_out
    # Pinned: the same side on every machine and Python.
    names = [Document(n, "") for n in ("json/decoder.py", "ast.py", "this.py", "re/_parser.py")]
    assert [d.name for d in split(names, 0.5, seed=0)[1]] == [
        "json/decoder.py",
        "this.py",
        "re/_parser.py",
    ]


def test_split_refuses_a_share_that_leaves_nothing():
    with pytest.raises(UserError, match="held_out_share=1.5"):
        split([], 1.5)


def test_equal_texts_and_repeated_paragraphs_stay_once():
    long = "A sentence that is repeated. " * 20
    kept = corpus._finish([Document("b", long), Document("a", long), Document("c", "short")])
    assert [d.name for d in kept] == ["a"]
    whole, part = corpus._without_repeated_paragraphs(
        [Document("part", "  same  text\n"), Document("whole", "first\n\nsame text\n\nlast\n")]
    )
    assert (whole.name, whole.text) == ("whole", "first\n\nsame text\n\nlast\n")
    assert part.text.strip() == ""


SOURCE = '''
    #!/usr/bin/env python
    """Module docstring
    in two lines."""

    import os  # why


    # a comment
    def empty():
        """Only a docstring, with an ü before the end: ü"""


    def one_line(): "docstring"; return "# no comment"


    class A:
        """Docstring."""

        # comment
        x = """text # kept

        """

        def f(self, a={"é": 1}):  # trailing
            r\'\'\'Doc.

            More.\'\'\'  # after

            y = f"""{a}

    # kept"""
            # last


            return [
                1,  # one
                # two
                2,
            ]
'''

STRIPPED = '''
    import os


    def empty():
        pass


    def one_line(): pass; return "# no comment"


    class A:
        x = """text # kept

        """

        def f(self, a={"é": 1}):
            y = f"""{a}

    # kept"""

            return [
                1,
                2,
            ]
'''


def test_strip_code_cuts_docstrings_and_comments_and_keeps_the_layout():
    stripped = strip_code(textwrap.dedent(SOURCE).lstrip("\n"))
    assert stripped == textwrap.dedent(STRIPPED).lstrip("\n")
    ast.parse(stripped)


def test_strip_code_of_nothing_but_a_docstring_is_empty():
    assert strip_code('"""Doc."""\n# comment\n') == ""


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="holds no Python sources"):
        corpus.write_corpus(tmp_path)
