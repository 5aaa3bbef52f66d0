"""`llamapro quickstart` at a size for tests, and what is said of its numbers.

Whether so small a model learns enough is for `llamapro quickstart` itself to check, at its own
size, by its exit status.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from math import inf, nextafter
from pathlib import Path
from typing import Any

import pytest

from llamapro_jax import cli
from llamapro_jax.config import load_config
from llamapro_jax.errors import UserError
from llamapro_jax.files import read_json, write_json
from llamapro_jax.quickstart import path as quickstart_path
from llamapro_jax.quickstart.corpus import FILES
from llamapro_jax.quickstart.results import Row, changes, off_measures_as_base, sentence
from llamapro_jax.quickstart.settings import FULL, TINY, Places, run_config
from llamapro_jax.quickstart.walk import Walk

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run(out: Path, *options: str) -> tuple[int, str]:
    """Exit status and standard output of a tiny quickstart."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = cli.main(["quickstart", "--out", str(out), "--tiny", *options])
    return status, output.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, str]]:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    yield out, *run(out)


def numbers(out: Path) -> list[list[Any]]:
    """The table without the seconds."""
    return [row[:-1] for row in read_json(out / "results.json")["rows"]]


# ------------------------------------------------------------------- the path


@pytest.mark.slow
def test_the_path_ends_with_a_table_a_sentence_and_checks(first: tuple[Path, int, str]) -> None:
    out, status, said = first
    result = read_json(out / "results.json")
    passed = [check["passed"] for check in result["checks"]]
    assert status == (0 if all(passed) else 1)
    assert result["columns"][0] == "model" and result["columns"][-1] == "seconds"
    rows = {row[0]: row[1:] for row in result["rows"]}
    assert list(rows) == [
        "base",
        "full fine-tuning",
        "LLaMA Pro",
        "LLaMA Pro with replay",
        "LLaMA Pro at strength 0.5",
        "LLaMA Pro at strength 0",
    ]
    assert all(row[0] > 1 and row[1] > 1 for row in rows.values())
    # Off is the base, to the last digit of what the two evaluations computed apart.
    assert rows["LLaMA Pro at strength 0"][:2] == rows["base"][:2]
    assert rows["LLaMA Pro"][:2] != rows["LLaMA Pro at strength 0.5"][:2] != rows["base"][:2]
    trainable = {name: row[2] for name, row in rows.items()}
    assert trainable["base"] == trainable["full fine-tuning"]
    assert 0 < trainable["LLaMA Pro"] == trainable["LLaMA Pro with replay"] < trainable["base"]
    assert trainable["LLaMA Pro at strength 0"] is None
    for text in (result["sentence"], *rows):
        assert text in said
    report = (out / "runs" / "pro" / "report.html").read_text()
    assert "LLaMA Pro with replay" in report and "what the table shows" in report


@pytest.mark.slow
def test_the_proofs_hold(first: tuple[Path, int, str]) -> None:
    checks = {c["what"]: c for c in read_json(first[0] / "results.json")["checks"]}
    exact = [c for w, c in checks.items() if re.search("to the bit|digit|frozen|export", w)]
    assert len(exact) == 4
    for check in exact:
        assert check["passed"] and check["found"].startswith("0 of ")


@pytest.mark.slow
def test_the_tuned_model_has_the_template_it_was_tuned_with(first: tuple[Path, int, str]) -> None:
    tuned = first[0] / "models" / "instruct"
    template = (tuned / "chat_template.jinja").read_text()
    assert "<|assistant|>" in template and re.search(r"\{%-? generation", template)
    assert read_json(tuned / "tokenizer_config.json")["chat_template"] == template
    summary = read_json(first[0] / "runs" / "instruct" / "summary.json")
    assert summary["parameters"]["trainable"] == summary["parameters"]["total"]
    checks = {c["what"]: c for c in read_json(first[0] / "results.json")["checks"]}
    answers = next(check for what, check in checks.items() if "end token" in what)
    assert re.fullmatch(r"\d+ of 20", answers["found"])


@pytest.mark.slow
def test_every_step_shows_a_command_that_a_user_can_type(first: tuple[Path, int, str]) -> None:
    commands = re.findall(r"\$ (llamapro .*)", first[2])
    verbs = [shlex.split(command)[1] for command in commands]
    for command in commands:
        cli.build_parser().parse_args(shlex.split(command)[1:])
    assert verbs.count("train") == 5 and verbs.count("evaluate") == 3
    assert verbs.count("export") == 3 and verbs.count("generate") == 2
    assert {"convert", "expand", "report"} < set(verbs)
    assert "Warning" not in first[2] and "WARNING" not in first[2]


@pytest.mark.slow
def test_what_is_written_needs_nothing_but_the_usual_files(first: tuple[Path, int, str]) -> None:
    for model in ("llama", "exported"):
        directory = first[0] / "models" / model
        assert (directory / "model.safetensors").is_file()
        assert (directory / "tokenizer.json").is_file()
        assert (directory / "tokenizer.model").is_file()
    config = read_json(first[0] / "models" / "llama" / "config.json")
    assert config["llamapro"]["generations"] == [], "the base has no new blocks"
    grown = read_json(first[0] / "models" / "exported" / "config.json")
    assert grown["num_hidden_layers"] == TINY.blocks + TINY.new


@pytest.mark.slow
def test_the_second_time_everything_is_kept(first: tuple[Path, int, str]) -> None:
    out, status, _ = first
    began = time.monotonic()
    again, said = run(out)
    assert again == status
    assert said.count("kept: done before") == quickstart_path.STEPS
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_an_interrupted_step_is_done_again(first: tuple[Path, int, str]) -> None:
    """Killed between the end of a step and its record: the directory is there and not recorded."""
    out = first[0]
    before = numbers(out)
    record = read_json(out / "quickstart.json")
    for name in ("expand", "train-pro"):
        del record["done"][name]
    write_json(out / "quickstart.json", record)
    _, said = run(out)
    assert said.count("kept: done before") == quickstart_path.STEPS - 2
    assert numbers(out) == before


@pytest.mark.slow
def test_another_seed_needs_another_directory(
    first: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = run(first[0], "--seed", "1")
    assert status == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(
    first: tuple[Path, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(directory: Path, **_: Any) -> dict[str, Path]:
        shutil.copytree(first[0] / "texts", directory)
        shutil.copytree(first[0] / "programs", tmp_path / "out" / "programs", dirs_exist_ok=True)
        return {name: directory / f"{name}.jsonl" for name in FILES}

    # The texts are a function of the Python alone, the programs of the settings; both take long.
    monkeypatch.setattr(quickstart_path, "write_corpus", copied)
    run(tmp_path / "out")
    assert numbers(tmp_path / "out") == numbers(first[0])


@pytest.mark.slow
def test_a_directory_that_moved_is_not_gone_on_with(
    first: tuple[Path, int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its configurations name the old place, and would train there."""
    (tmp_path / "moved").mkdir()
    shutil.copy(first[0] / "quickstart.json", tmp_path / "moved")
    status, _ = run(tmp_path / "moved")
    assert status == 2
    assert f"out: {first[0]} -> {tmp_path / 'moved'}" in capsys.readouterr().err


# ------------------------------------------------------------------- its parts


def test_it_refuses_a_directory_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else.*name another --out"):
        Walk(tmp_path, TINY.identity(), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_step_is_recorded_only_when_it_ended_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made = tmp_path / "out", tmp_path / "out" / "made"

    def fails() -> list[str]:
        raise UserError("no")

    def works() -> list[str]:
        made.write_text("it")
        return ["made it"]

    with pytest.raises(UserError):
        Walk(out, TINY.identity(), 1).step("one", "One", "one", [made], fails)
    Walk(out, TINY.identity(), 1).step("one", "One", "one", [made], works)
    assert "kept" not in capsys.readouterr().out
    Walk(out, TINY.identity(), 1).step("one", "One", "one", [made], fails)
    assert "made it  (kept: done before)" in capsys.readouterr().out
    made.unlink()
    with pytest.raises(UserError):
        Walk(out, TINY.identity(), 1).step("one", "One", "one", [made], fails)


def test_the_record_of_another_tool_is_no_quickstart(tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="is not the record of a quickstart"):
        Walk(tmp_path, TINY.identity(), 1)


def table(pro: tuple[float, float], full: tuple[float, float]) -> list[Row]:
    rows = {
        "base": (100.0, 50.0),
        "full fine-tuning": full,
        "LLaMA Pro": pro,
        "LLaMA Pro with replay": (105.0, 42.0),
        "LLaMA Pro at strength 0.5": (110.0, 44.0),
        "LLaMA Pro at strength 0": (100.0, 50.0),
    }
    return [Row(name, *figures, None, None) for name, figures in rows.items()]


@pytest.mark.parametrize(
    ("pro", "full", "expected"),
    [
        ((130.0, 40.0), (150.0, 30.0), "learned less but forgot less than full"),
        ((130.0, 40.0), (120.0, 30.0), "learned less and forgot more than full"),
        ((130.0, 30.0), (120.0, 40.0), "learned more but forgot more than full"),
        ((110.0, 30.0), (120.0, 40.0), "learned more and forgot less than full"),
        ((110.0, 30.0), (120.0, 30.1), "learned as much and forgot less than full"),
    ],
)
def test_the_sentence_follows_the_numbers(
    pro: tuple[float, float], full: tuple[float, float], expected: str
) -> None:
    rows = table(pro, full)
    said = sentence(rows)
    assert expected in said
    assert f"code {100 * (pro[1] / 50 - 1):+.1f} % and prose {pro[0] - 100:+.1f} %" in said
    assert "replay took prose to +5.0 % (code -16.0 %)" in said
    assert changes(rows)["base"] == (0.0, 0.0)


@pytest.mark.parametrize("moved", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_off_must_measure_exactly_as_the_base_does(moved: tuple[int, int]) -> None:
    rows = table((130.0, 40.0), (150.0, 30.0))
    prose, code = (nextafter(p, inf) if moved[i] else p for i, p in enumerate((100.0, 50.0)))
    rows[-1] = Row("LLaMA Pro at strength 0", prose, code, None, None)
    check = off_measures_as_base(rows)
    assert check.passed == (moved == (0, 0)) and check.found == f"{sum(moved)} of 2 differ"


@pytest.mark.parametrize(
    ("file", "run"), [("quickstart.yaml", "pro"), ("quickstart_instruct.yaml", "instruct")]
)
def test_the_shipped_configs_are_runs_of_the_quickstart(file: str, run: str) -> None:
    ours = run_config(run, FULL, Places(Path("runs/quickstart")))
    assert load_config(CONFIGS / file) == ours


def test_replay_is_a_tenth_and_the_control_trains_the_base() -> None:
    places = Places(Path("out"))
    replay = run_config("replay", FULL, places)
    assert [(s.name, s.weight) for s in replay.data.sources] == [("code", 0.9), ("prose", 0.1)]
    full, pro = run_config("full", FULL, places), run_config("pro", FULL, places)
    assert full.model == "out/models/base" and full.trainable == ("all",)
    assert pro.model == "out/models/expanded" and pro.trainable == ("new",)
    assert full.training == pro.training and full.data == pro.data
    assert run_config("pro", replace(FULL, seed=3), places).seed == 3
