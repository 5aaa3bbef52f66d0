"""What the documents point at is there: files, headings, drawings; the index has every page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES, *ROOT.glob("*/README.md")])
INDEX = ROOT / "docs" / "README.md"
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^)\s>]+)[^)]*\)")
# What is in the repository; `llamapro_jax/xla` alone may also be a directory of a user's.
OWN_FILE = re.compile(
    r"(?<![\w/.-])((?:benchmarks|configs|docs|launch|llamapro_jax|tests)/[\w/.-]*\w"
    r"\.(?:py|md|yaml|sh|json|svg|sbatch))\b"
)


# What a source that is cited calls a file of its own.
OF_OTHERS = {"benchmarks/xla_flags_library.py"}


def without_code(text: str) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", without_code(path.read_text()), re.MULTILINE):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", without_code(path.read_text()))
    yield from LINK.findall(text)
    yield from re.findall(r'(?:href|src|srcset)="([^"]+)"', text)


def broken(path: Path) -> list[str]:
    """The links of a document that lead nowhere in the repository."""
    found = []
    for link in links(path):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        if not target.exists() or ROOT not in target.resolve().parents:
            found.append(link)
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            found.append(link)
    return found


def test_a_link_that_leads_nowhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "two.md").write_text("# Two\n\n## The `half`, and more\n\n## Twice\n\n## Twice\n")
    one = tmp_path / "one.md"
    one.write_text(
        "# One\n[a](two.md) [b](two.md#the-half-and-more) [c](#one) [d](two.md#twice-1)\n"
        "[e](https://example.org/#x)\n```\n[f](nowhere.md)\n```\n"
        "[g](three.md) [h](two.md#half) ![i](drawing.svg) [j](#two) [k](two.md#twice-2)\n"
    )
    assert broken(one) == ["three.md", "two.md#half", "drawing.svg", "#two", "two.md#twice-2"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_every_page_is_in_the_index() -> None:
    linked = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links(INDEX)}
    assert [page.name for page in PAGES if page != INDEX and page not in linked] == []
    for directory in ("launch", "benchmarks"):
        assert ROOT / directory / "README.md" in linked


def test_the_readme_leads_to_the_index() -> None:
    assert "docs/README.md" in set(links(ROOT / "README.md"))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_page_begins_with_what_it_is_for(page: Path) -> None:
    """A title, and below it a paragraph of words."""
    title, _, rest = page.read_text().lstrip().partition("\n")
    assert re.match(r"# \S", title), title
    first = rest.strip().splitlines()[0]
    assert re.match(r"[A-Z*]", first) and len(first.split()) > 3, first


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, *sorted(ROOT.glob("configs/*.yaml"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_that_is_named_exists(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("it also names what was there once")
    names = set(OWN_FILE.findall(document.read_text())) - OF_OTHERS
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_each_question_has_an_answer_that_leads_on() -> None:
    page = (ROOT / "docs" / "faq.md").read_text()
    questions = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    assert len(questions) >= 20
    for question in questions:
        title, _, answer = question.partition("\n")
        assert title.endswith("?"), title
        assert re.search(r"```bash\n|\]\((?!https?:)", answer), title
        for asked in re.findall(r"\]\((https?://[^)]+)\)", answer):
            assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", asked), (
                asked
            )
