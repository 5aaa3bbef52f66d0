"""What the documents tell people to type works."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_tiny
from huggingface_hub import constants

from llamapro_jax import cli
from llamapro_jax.hf.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
RECIPE = "Five steps"


def code_lines(text: str) -> Iterator[str]:
    """Lines of the fenced blocks, and of comments of the shipped configs, joined at backslashes."""
    for block in re.findall(r"^```(?:bash|sh|console|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def typed(prefix: str) -> list[tuple[str, str]]:
    """(where, command) for each command of the documents, examples and configs."""
    found = []
    for document in DOCUMENTS:
        for line in code_lines(document.read_text()):
            found.append((document.name, line.split(" #")[0].strip().removeprefix("$ ")))
        for inline in re.findall(r"`(llamapro [^`\n]+)`", document.read_text()):
            found.append((document.name, inline))
    for verb in cli.VERBS:
        example = importlib.import_module(f"llamapro_jax.verbs.{verb}").EXAMPLE
        found += [(f"{verb} --help", line.strip()) for line in example.splitlines()]
    for config in ROOT.glob("configs/*.yaml"):
        comments = re.findall(r"^#\s+(llamapro .*)$", config.read_text(), re.MULTILINE)
        found += [(config.name, line) for line in comments]
    return [(where, line) for where, line in found if line.startswith(prefix)]


# A placeholder in capitals stands for what a reader puts there.
COMMANDS = [c for c in typed("llamapro ") if not re.search(r"\.\.\.|\[|\bVERB\b", c[1])]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20 and len(DOCUMENTS) > 5


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_every_command_is_one_that_the_program_takes(where: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[:1] and words[0].startswith("--"):
        return
    try:
        parsed = cli.build_parser().parse_args(words)
    except SystemExit as stop:
        # --help ends with 0; an option or a verb that does not exist with 2. A verb alone is a
        # mention, not a command.
        assert stop.code == 0 or (len(words) == 1 and words[0] in cli.VERBS), (where, command)
        return
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), (where, command)
    assert parsed.verb in cli.VERBS


@pytest.mark.parametrize("where,command", typed("make "))
def test_every_make_target_exists(where: str, command: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command.split()[1] in targets


@pytest.mark.parametrize("where,command", typed("python "))
def test_every_script_and_module_that_python_is_given_exists(where: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        assert words[1] in ("pytest", "pip") or importlib.util.find_spec(words[1]), (where, command)
    elif not words[0].startswith("-"):
        assert (ROOT / words[0]).is_file(), (where, command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_extra_that_is_installed_is_declared(document: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:llamapro_jax|\.)\[([a-z0-9,]+)\]", document.read_text()):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def recipe() -> list[str]:
    section = (ROOT / "README.md").read_text().partition(f"## {RECIPE}")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block.group(1).strip().splitlines()


TINY_RUN = """
architecture=null compute_dtype=float32 data.sequence_length=32 data.batch_size=4
training.microbatch=auto
training.steps=3 training.eval_every=null training.eval_batches=1 training.save_every=null
data.sources.0.kind=text data.sources.0.path=data/prose.txt data.sources.1.kind=text
data.sources.1.path=data/code.txt data.eval.0.kind=text data.eval.0.path=data/lambada.txt
data.eval.0.split=train data.eval.1.kind=text data.eval.1.path=data/more.txt
data.eval.1.split=train
""".split()


@pytest.mark.slow
def test_the_five_steps_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's own lines, on 32 layers of a tiny LLaMA 2 in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--meta-llama--Llama-2-7b-hf"
    snapshot = write_tiny(
        repository / "snapshots" / "0", num_hidden_layers=32, vocab_size=400, hidden_size=16
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    text = (ROOT / "README.md").read_text()
    train_tokenizer([text], 400, snapshot)
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("prose", "code", "lambada", "more")):
        (tmp_path / "data" / f"{name}.txt").write_text(f"{number} {text}")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    lines = recipe()
    verbs = [line.split()[1] for line in lines]
    assert verbs == ["convert", "expand", "train", "evaluate", "export"]
    for line in lines:
        words = shlex.split(line)[1:]
        assert cli.main(words + (TINY_RUN if words[0] == "train" else [])) == 0, line
    assert (tmp_path / "exports" / "llama2-7b-pro" / "model.safetensors").is_file()
    assert cli.main(["inspect", "exports/llama2-7b-pro"]) == 0
