"""Evaluation: the figures by hand, the base to the bit, what it is measured against, the verb."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_tiny
from models import disturbed, english, expand_to, save, write_with_tokenizer

from llamapro_jax import UserError, cli
from llamapro_jax.evaluation import texts as evaluate
from llamapro_jax.evaluation.comparison import recorded_original
from llamapro_jax.evaluation.texts import (
    as_json,
    as_table,
    default_sequence_length,
    read_text,
)
from llamapro_jax.expansion import Insertion, spread
from llamapro_jax.model import api
from llamapro_jax.model.api import Model, load

LENGTH = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the base grown, the same with random new blocks, and texts."""
    path = tmp_path_factory.mktemp("evaluate")
    base = write_with_tokenizer(path / "base")
    model = disturbed(load(str(expand_to(base, path / "grown"))))
    save(model, path / "model")
    (path / "short.txt").write_text(english(1, 8).strip())
    (path / "prose.txt").write_text(english(2, 120))
    lines = [json.dumps({"text": english(seed, 15)}) for seed in range(6)]
    (path / "lines.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(files: Path) -> Model:
    return load(str(files / "model"))


@pytest.fixture(scope="module")
def base(files: Path) -> Model:
    return load(str(files / "base"))


def run(model: Model, text: Path, **options: Any) -> list[dict[str, Any]]:
    options = {"sequence_length": LENGTH, "batch_size": 4, **options}
    return evaluate.evaluate(model, {"text": text}, **options)


def log_softmax(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_figures_are_those_computed_by_hand(files: Path, model: Model, base: Model) -> None:
    text = (files / "short.txt").read_text()
    ids = model.require_tokenizer().encode(text, bos=True, eos=True)
    assert len(ids) <= 64
    log_p = log_softmax(model.logits([ids]))[0, :-1]
    log_q = log_softmax(base.logits([ids]))[0, :-1]
    nll = -log_p[np.arange(len(ids) - 1), ids[1:]]
    best = log_p.argmax(-1)
    ranks = [1 + sum(q > q[b]) for q, b in zip(log_q, best, strict=True)]
    on, off = run(model, files / "short.txt", sequence_length=64)
    assert (on["model"], on["strength"], on["targets"]) == ("new blocks on", 1.0, len(ids) - 1)
    np.testing.assert_allclose(on["nll"], nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(on["perplexity"], math.exp(nll.mean()), rtol=1e-5)
    np.testing.assert_allclose(
        on["bits_per_byte"], nll.sum() / math.log(2) / len(text.encode()), rtol=1e-5
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    np.testing.assert_allclose(on["kl"], kl, rtol=1e-4)
    intervals = ((1, 1), (2, 3), (4, 999))
    shares = [np.mean([low <= rank <= high for rank in ranks]) for low, high in intervals]
    assert [on["unshifted"], on["marginal"], on["shifted"]] == pytest.approx(shares)
    assert min(shares) > 0  # each of the three is tested
    assert (off["unshifted"], off["marginal"], off["shifted"], off["kl"]) == (1, 0, 0, 0)


@pytest.mark.parametrize("insertions", [spread(4, 2), (Insertion(0, 0), Insertion(2, 1))])
@pytest.mark.parametrize("text", ["prose.txt", "lines.jsonl"])
def test_off_is_the_base_to_the_bit(
    insertions: tuple[Insertion, ...], text: str, files: Path, base: Model, tmp_path: Path
) -> None:
    grown = disturbed(load(str(expand_to(files / "base", tmp_path / "grown", insertions))))
    on, off = run(grown, files / text)
    (alone,) = run(base, files / text)
    assert off["model"] == "new blocks off" and alone["model"] == "model"
    for figure in ("targets", "nll", "loss", "perplexity", "bits_per_byte"):
        assert off[figure] == alone[figure]
    assert alone["kl"] is None and alone["strength"] is None
    assert on["nll"] != off["nll"] and on["kl"] > 0


def test_a_model_just_expanded_is_its_base_in_every_figure(files: Path) -> None:
    on, off = run(load(str(files / "grown")), files / "prose.txt")
    assert on["nll"] == off["nll"] and on["kl"] == 0 and on["unshifted"] == 1


def test_strengths_are_those_of_a_model_loaded_at_them(
    files: Path, model: Model, tmp_path: Path
) -> None:
    strengths = [1.0, 0.75, 0.25, 0.0]
    results = run(model, files / "prose.txt", strengths=strengths)
    labels = ["new blocks on", "strength 0.75", "strength 0.25", "new blocks off"]
    assert [r["model"] for r in results] == labels
    assert [r["strength"] for r in results] == strengths
    kls = [r["kl"] for r in results]
    assert kls == sorted(kls, reverse=True) and kls[2] > 0
    loaded = load(str(files / "model"), strength=0.25)
    with pytest.raises(UserError, match="loaded at strength 0.25"):
        run(loaded, files / "prose.txt")
    save(loaded, tmp_path / "quarter")
    quarter, _ = run(load(str(tmp_path / "quarter")), files / "prose.txt")
    assert quarter["nll"] == results[2]["nll"] and quarter["kl"] == results[2]["kl"]


def test_neither_the_batch_nor_the_chunk_changes_the_figures(
    files: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(model, files / "prose.txt")
    evaluate._compare.clear_cache()
    monkeypatch.setattr(evaluate, "SCORES_AT_ONCE", 24 * model.config.vocab_size)
    for batch_size in (1, 3):
        for first, second in zip(
            run(model, files / "prose.txt", batch_size=batch_size), expected, strict=True
        ):
            assert first["targets"] == second["targets"]
            for figure in ("nll", "kl", "unshifted", "marginal", "shifted"):
                assert first[figure] == pytest.approx(second[figure], rel=1e-4, abs=1e-6)
    evaluate._compare.clear_cache()


def test_scores_exist_for_a_chunk_of_tokens_at_a_time(model: Model) -> None:
    B, T, D, V = 4, 256, 32, 50_000
    arguments = [np.zeros(shape, np.float32) for shape in ((B, T, D), (V, D)) * 2]
    compiled = evaluate._compare.lower(*arguments, np.zeros((B, T), np.int32)).compile()
    whole = B * T * V * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * evaluate.SCORES_AT_ONCE * 4
    assert evaluate.SCORES_AT_ONCE * 4 < whole


# ------------------------------------------------------------------- texts


def test_rows_are_those_of_training_in_the_order_of_the_files(files: Path, model: Model) -> None:
    tokenizer = model.require_tokenizer()
    text = read_text("lines", files / "lines.jsonl", tokenizer, LENGTH)
    documents = [
        tokenizer.encode(json.loads(line)["text"], eos=True)
        for line in (files / "lines.jsonl").read_text().splitlines()
    ]
    tokens = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in text.rows])
    np.testing.assert_array_equal(tokens, np.concatenate(documents))
    assert text.tokens == len(tokens) - 6
    assert text.bytes == sum(len(english(seed, 15).encode()) for seed in range(6))


def test_max_rows_reads_the_first_rows_and_keeps_the_ratio_of_bytes(
    files: Path, model: Model
) -> None:
    tokenizer = model.require_tokenizer()
    whole = read_text("lines", files / "lines.jsonl", tokenizer, LENGTH)
    first = read_text("lines", files / "lines.jsonl", tokenizer, LENGTH, max_rows=2)
    assert len(whole.rows) > 4 and len(first.rows) == 2
    np.testing.assert_array_equal(first.rows[1]["tokens"], whole.rows[1]["tokens"])
    # Whole documents, up to the one that the second row ends in.
    texts = [english(seed, 15) for seed in range(6)]
    lengths = [len(tokenizer.encode(text, eos=True)) for text in texts]
    read = 1 + int(np.searchsorted(np.cumsum(lengths), 2 * LENGTH))
    assert 1 < read < 6
    assert first.tokens == sum(lengths[:read]) - read
    assert first.bytes == sum(len(text.encode()) for text in texts[:read])
    on, _ = run(model, files / "lines.jsonl", max_rows=1)
    assert 0 < on["targets"] < LENGTH


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin1"), r"latin.txt: is not UTF-8 .* at byte 3"),
        ("empty.txt", b"", "empty.txt: holds no text"),
        ("absent.txt", None, "absent.txt: no such file"),
        ("a.csv", b"a,b", "a.csv: a text is a directory or a file that ends in .txt"),
        ("bad.jsonl", b"{", "bad.jsonl:1: is not JSON"),
        # It has no setting `field`, as a configuration has.
        ("a.jsonl", b'{"body": "a"}', "it has 'body'; rename the one that holds .* to 'text'"),
    ],
)
def test_texts_that_cannot_be_read_are_named(
    name: str, content: bytes | None, message: str, model: Model, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(model, tmp_path / name)


@pytest.mark.parametrize(("file", "what"), [("state.json", "`save"), ("dataset_info.json", "TFDS")])
def test_a_text_of_another_kind_is_to_be_written_anew(
    model: Model, tmp_path: Path, file: str, what: str
) -> None:
    for name in {file, "dataset_info.json"}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{what}.*: write its documents into a .jsonl") as caught:
        run(model, tmp_path)
    assert "set kind" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": [1.5]}, "strength is 1.5; it must be between 0 and 1"),
        ({"sequence_length": 65}, "sequence_length is 65; this model takes 2 to 64"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_values_out_of_range_are_refused(
    options: dict[str, Any], message: str, files: Path, model: Model
) -> None:
    with pytest.raises(UserError, match=message):
        run(model, files / "prose.txt", **options)


def test_models_that_do_not_fit_are_refused(
    files: Path, model: Model, base: Model, tmp_path: Path
) -> None:
    text = files / "short.txt"
    with pytest.raises(UserError, match="no text to evaluate on"):
        evaluate.evaluate(model, {})
    with pytest.raises(UserError, match="base: has no new blocks, so strength means nothing"):
        run(base, text, strengths=[0.5])
    without = load(str(write_tiny(tmp_path / "without")))
    with pytest.raises(UserError, match="looked for tokenizer.json and tokenizer.model"):
        run(without, text)
    with pytest.raises(UserError, match="has a vocabulary of 101"):
        run(model, text, base=without)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(files / "base" / name, tmp_path / "without" / name)
    with pytest.raises(UserError, match="not in the vocabulary, which has 101"):
        run(load(str(tmp_path / "without")), text)


# ------------------------------------------------------------------- against which base


def test_another_base_can_be_named(files: Path, model: Model, base: Model) -> None:
    own_on, own_off = run(model, files / "prose.txt")
    on, off, named = run(model, files / "prose.txt", base=base)
    assert named["model"] == "base" and named["nll"] == own_off["nll"] == off["nll"]
    assert on["kl"] == own_on["kl"] and named["kl"] == 0
    tuned, named = run(base, files / "prose.txt", base=model)
    assert (tuned["model"], named["model"]) == ("model", "base")
    assert named["nll"] == own_on["nll"] and tuned["kl"] > 0


def test_a_base_that_trained_is_labelled_and_the_recorded_original_measured_against(
    files: Path, base: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grown = shutil.copytree(files / "grown", tmp_path / "before")
    config = json.loads((files / "grown" / "config.json").read_text())
    digest = load(str(grown)).source.fingerprint().digest
    entry = {"verb": "train", "source": str(grown), "trainable": ["all"], "steps": 3}
    entry["base_digest"] = digest
    config["llamapro"]["lineage"].append(entry)
    tuned = shutil.copytree(files / "model", tmp_path / "tuned")
    (tuned / "config.json").write_text(json.dumps(config))
    model = load(str(tuned))
    on, off, original = run(model, files / "prose.txt")
    assert off["model"] == "new blocks off (trained too: not the original)"
    assert original["model"] == "base"
    assert original["nll"] == run(base, files / "prose.txt")[0]["nll"]
    assert on["kl"] > 0 and original["kl"] == 0

    entry["base_digest"] = "0" * 64
    (tuned / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="before: is not the model that .*tuned was trained from"):
        recorded_original(load(str(tuned)))
    shutil.rmtree(grown)
    with caplog.at_level(logging.WARNING):
        on, off = run(load(str(tuned)), files / "prose.txt")
    assert "forgetting is not measured. Name the original with --base" in caplog.text
    assert on["kl"] is off["kl"] is on["unshifted"] is None


# ------------------------------------------------------------------- the verb


def test_the_verb_prints_a_table_and_writes_json(
    files: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"a={files / 'short.txt'}", f"b={files / 'lines.jsonl'}"]
    out = tmp_path / "result.json"
    options = ["--strength", "0.5", "--sequence-length", str(LENGTH), "--max-rows", "2"]
    status = cli.main(
        ["evaluate", str(files / "model"), "--text", *texts, *options, "--json", str(out)]
    )
    printed = capsys.readouterr().out
    assert status == 0
    expected = evaluate.evaluate(
        model,
        {"a": files / "short.txt", "b": files / "lines.jsonl"},
        strengths=[1.0, 0.5, 0.0],
        sequence_length=LENGTH,
        max_rows=2,
    )
    written = json.loads(out.read_text())
    assert written["results"] == as_json(expected) and written["max_rows"] == 2
    figure = f"{expected[0]['bits_per_byte']:.4f}"
    for word in ("perplexity", "strength 0.5", "new blocks off", figure):
        assert word in printed
    before = ["evaluate", str(files / "model"), "--text", texts[0], "--generations", "0"]
    assert cli.main([*before, "--max-rows", "1", "--sequence-length", str(LENGTH)]) == 0
    # The title of the table wraps where the path is long.
    assert "after 0 expansions" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "prose.txt"], "--text prose.txt: must be NAME=PATH"),
        (["--text", "a=x.txt", "a=y.txt"], "'a' is given twice"),
        (["--text", "a=absent.txt"], "absent.txt: no such file"),
        (["--text", "a=TEXT", "--generations", "2"], "generation 2 does not exist"),
        (["--text", "a=TEXT", "--strength", "2"], "strength is 2.0"),
        (["--text", "a=TEXT", "--strength", "nan"], "strength is nan"),
        (["--text", "a=TEXT", "--batch-size", "0"], "batch_size is 0"),
        (["--text", "a=TEXT", "--sequence-length", "65"], "sequence_length is 65"),
        (["--text", "a=DIR/latin.txt"], "latin.txt: is not UTF-8"),
        (["--text", "a=DIR/empty.txt"], "empty.txt: holds no text"),
        (["--text", "a=TEXT", "--base", "DIR/without"], "has a vocabulary of 101"),
        (["--text", "a=TEXT", "--json", "DIR"], "is a directory; name the file to write"),
        (["--text", "a=TEXT", "--json", "DIR/no/a.json"], "no is not a directory; make it first"),
        (["--text", "a=TEXT", "--json", "TEXT/a.json"], "short.txt is not a directory"),
    ],
)
def test_the_verb_refuses_bad_arguments_before_it_reads_weights(
    arguments: list[str],
    message: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "load_params", None)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    (tmp_path / "empty.txt").touch()
    write_tiny(tmp_path / "without")
    places = {"TEXT": str(files / "short.txt"), "DIR": str(tmp_path)}
    for name, path in places.items():
        arguments = [a.replace(name, path) for a in arguments]
    assert cli.main(["evaluate", str(files / "model"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused_before_its_weights_are_read(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "load_params", None)
    without = str(write_tiny(tmp_path / "without"))
    assert cli.main(["evaluate", without, "--text", f"a={files / 'short.txt'}"]) == 2
    assert "looked for tokenizer.json and tokenizer.model" in capsys.readouterr().err


def test_a_figure_that_is_not_finite_is_null_in_json() -> None:
    result = {key: math.inf for key in evaluate.COLUMNS} | {"text": "a", "model": "model"}
    assert as_json([result])[0]["perplexity"] is None
    table = as_table([result])
    assert len(table["columns"]) == len(table["rows"][0]) and table["rows"][0][3] is None


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["new", "all"])
def test_a_run_is_evaluated_with_its_own_rows_and_keeps_its_table(
    trainable: str, files: Path, base: Model, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {files / "grown"}
output: {tmp_path / "run"}
trainable: [{trainable}]
compute_dtype: float32
data:
  sequence_length: 24
  batch_size: 4
  sources: [{{name: prose, path: {files / "prose.txt"}}}]
training: {{steps: 3}}
optimizer: {{learning_rate: 0.05, warmup_steps: 0}}
tracking: {{tensorboard: false}}
"""
    )
    assert cli.main(["train", str(config)]) == 0
    run_path = str(tmp_path / "run")
    assert cli.main(["evaluate", run_path, "--text", f"short={files / 'short.txt'}"]) == 0
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert table["step"] == 3 and table["max_rows"] is None
    assert table["title"] == f"{run_path} in float32, rows of 24 tokens"
    rows = {row[1]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    model = load(run_path)
    assert default_sequence_length(model) == 24
    (alone,) = run(base, files / "short.txt", sequence_length=24, batch_size=8)
    reference = "new blocks off" if trainable == "new" else "base"
    assert rows[reference]["perplexity"] == alone["perplexity"]
    assert rows["new blocks on"]["KL to base"] > 0 == rows[reference]["KL to base"]
    assert ("new blocks off (trained too: not the original)" in rows) == (trainable == "all")
