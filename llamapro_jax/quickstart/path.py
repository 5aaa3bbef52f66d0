"""The whole path: text, a real base, then the verbs as a user types them, and what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llamapro_jax.config import save_config
from llamapro_jax.data.readers.documents import Content, texts
from llamapro_jax.evaluation.texts import read_text
from llamapro_jax.files import read_json, write_json
from llamapro_jax.hf.tokenizer import load_tokenizer, train_tokenizer
from llamapro_jax.metrics import duration, read_metrics
from llamapro_jax.quickstart import results
from llamapro_jax.quickstart.base import shared_programs, write_random_model
from llamapro_jax.quickstart.corpus import FILES, write_corpus
from llamapro_jax.quickstart.settings import DOMAINS, RUNS, Places, Settings, run_config
from llamapro_jax.quickstart.walk import Walk
from llamapro_jax.training.run_directory import SUMMARY_FILE

STEPS = 18
PROMPT = "def "
QUESTION = "What does json.loads do?"
GENERATED = 48
SAMPLING = ("--temperature", "0.7", "--top-k", "20")
EVALUATED = "All models of the quickstart, on held-out text"
# Rows of held-out text whose logits are compared bit by bit.
COMPARED = 4


def quickstart(out: Path, settings: Settings) -> bool:
    """Runs the path in `out`, keeping what is finished there. Returns whether all checks passed.

    Raises UserError when `out` holds something else, or a quickstart of other settings.
    """
    began = time.monotonic()
    # The configurations name paths as they were given: a directory that moved is not gone on with.
    place = {"out": os.fspath(out), "working directory": os.getcwd()}
    walk = Walk(out, {**settings.identity(), **place}, STEPS)
    places = Places(out)
    with shared_programs(out / "programs"):
        make_base(walk, places, settings)
        grow(walk, places, settings)
        for name, title in (
            ("pro", "Train the new blocks on code"),
            ("replay", "The same with 10 % of prose replayed"),
            ("full", "The control: as many steps of full fine-tuning of the base"),
        ):
            train(walk, places, settings, name, title)
            evaluate(walk, places, settings, name)
        hand_back(walk, places)
        instruct(walk, places, settings)
        passed = conclude(walk, places, settings)
    kept = f", {walk.kept} of {STEPS} steps kept from before" if walk.kept else ""
    print(f"\n{duration(time.monotonic() - began)} in all{kept}. Everything is in {out}.")
    return passed


# ------------------------------------------------------------------- a base


def make_base(walk: Walk, places: Places, settings: Settings) -> None:
    """Steps 1 to 4: the checkpoint from which a user's own path starts."""

    def corpus() -> Sequence[str]:
        paths = write_corpus(places.out / "texts", held_out_share=settings.held_out)
        sizes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        for name in RUNS:
            save_config(run_config(name, settings, places), places.config(name))
        return [
            f"{sizes['prose_train']:.1f} MB of prose, {sizes['code_train']:.1f} MB of code; held "
            f"out by file: {sizes['prose_heldout']:.2f} and {sizes['code_heldout']:.2f} MB"
        ]

    walk.step(
        "texts",
        "English prose and Python code, from the standard library of this Python",
        f"python: llamapro_jax.quickstart.corpus.write_corpus({str(places.out / 'texts')!r})",
        [*(places.text(name) for name in FILES), *(places.config(name) for name in RUNS)],
        corpus,
    )

    def random_model() -> Sequence[str]:
        walk.remove([places.model("random"), places.model("tokenizer")])
        documents = texts(Content(os.fspath(places.text("base_train"))))
        tokenizer = train_tokenizer(documents, settings.vocabulary, places.model("tokenizer"))
        count = write_random_model(
            settings.model_config(), tokenizer.source, places.model("random"), settings.seed
        )
        return [
            f"a LLaMA of {count:,} random parameters, {settings.blocks} blocks, and its tokenizer: "
            f"SentencePiece BPE with byte fallback, {tokenizer.vocab_size:,} tokens"
        ]

    walk.step(
        "random",
        "A tokenizer and a LLaMA of random weights, as a Hugging Face directory",
        f"python: llamapro_jax.quickstart.base.write_random_model("
        f"..., {str(places.model('random'))!r})",
        [places.model("random")],
        random_model,
    )
    train(walk, places, settings, "base", "Train it on prose with 10 % code: a real base")
    checkpoint = places.model("llama")
    walk.verb(
        "base-export",
        "Write it as a PyTorch checkpoint. From here on, yours would do as well",
        ["export", str(places.run("base")), str(checkpoint)],
        [checkpoint],
        walk.last_line,
    )


# ------------------------------------------------------------------- the verbs


def grow(walk: Walk, places: Places, settings: Settings) -> None:
    checkpoint, base, expanded = (str(places.model(n)) for n in ("llama", "base", "expanded"))
    walk.verb(
        "convert",
        "Convert the checkpoint",
        ["convert", checkpoint, base],
        [places.model("base")],
        walk.last_line,
    )
    walk.verb(
        "expand",
        "Insert new blocks; the identity is proven",
        ["expand", base, expanded, "--blocks", str(settings.new)],
        [places.model("expanded")],
        walk.last_line,
    )


def train(walk: Walk, places: Places, settings: Settings, name: str, title: str) -> None:
    run = places.run(name)

    def result() -> Sequence[str]:
        summary = read_json(run / SUMMARY_FILE)
        curve = {domain: held_out_curve(run, domain) for domain in DOMAINS}
        moved = ", ".join(f"{d} {points[0]:.1f} -> {points[-1]:.1f}" for d, points in curve.items())
        parts = summary["parameters"]
        return [
            f"{parts['trainable']:,} of {parts['total']:,} parameters, {summary['steps']} steps",
            f"held-out perplexity while training (a part of the texts): {moved}",
        ]

    words = ["train", str(places.config(name))]
    walk.verb(f"train-{name}", title, words, [run / SUMMARY_FILE], result)


def held_out_curve(run: Path, text: str) -> list[float]:
    return [
        record["perplexity"]
        for record in read_metrics(run)
        if record["kind"] == "eval" and record["name"] == text
    ]


def evaluate(walk: Walk, places: Places, settings: Settings, name: str) -> None:
    file = places.evaluation(name)
    words = ["evaluate", str(places.run(name)), "--text"]
    words += [f"{domain}={places.text(f'{domain}_heldout')}" for domain in DOMAINS]
    words += ["--strength", "0.5"] if name == "pro" else []
    # Without it, it is compared with what was there before all training, the base's too.
    words += ["--base", str(places.model("base"))] if name == "full" else []
    words += ["--max-rows", str(settings.evaluated), "--json", str(file)]

    def result() -> Sequence[str]:
        said: dict[str, list[str]] = {}
        for figure in read_json(file)["results"]:
            part = f"{figure['text']} {figure['perplexity']:.1f}"
            said.setdefault(figure["model"], []).append(part)
        return [f"{model}: {', '.join(parts)}" for model, parts in said.items()]

    file.parent.mkdir(parents=True, exist_ok=True)
    title = "Measure it on held-out prose and held-out code"
    walk.verb(f"evaluate-{name}", title, words, [file], result)


def hand_back(walk: Walk, places: Places) -> None:
    """Export, and generate from what was exported."""
    exported = places.model("exported")
    walk.verb(
        "export",
        "Write the grown model as a Hugging Face checkpoint, and load it again",
        ["export", str(places.run("pro")), str(exported)],
        [exported],
        walk.last_line,
    )
    walk.verb(
        "generate",
        "Generate from it (a toy: do not expect sense)",
        ["generate", str(exported), PROMPT, "--max-tokens", str(GENERATED), *SAMPLING],
        [],
        lambda: walk.last_lines[:6],
    )


def instruct(walk: Walk, places: Places, settings: Settings) -> None:
    """Instruction tuning of all that the new blocks' run gave, and a question."""
    title = "Instruction-tune all of it on questions and answers, the loss on the answers alone"
    train(walk, places, settings, "instruct", title)
    tuned = places.model("instruct")
    walk.verb(
        "export-instruct",
        "Write it as a Hugging Face checkpoint, with its chat template",
        ["export", str(places.run("instruct")), str(tuned)],
        [tuned],
        walk.last_line,
    )
    walk.verb(
        "ask",
        "Ask it (a toy: it has the form of an answer, not the knowledge)",
        ["generate", str(tuned), QUESTION, "--chat", "--max-tokens", str(GENERATED)],
        [],
        lambda: walk.last_lines[:2],
    )


# ------------------------------------------------------------------- what came of it


def conclude(walk: Walk, places: Places, settings: Settings) -> bool:
    """Prints table, sentence and checks; writes them as JSON and into the report."""
    rows = results.table(places)
    found = results.checks(rows, places, held_out_tokens(places, settings))
    said = results.sentence(rows)
    result = results.as_json(rows, said, found)
    run = places.run("pro")
    shown = {name: result[name] for name in ("columns", "rows")}
    write_json(run / "evaluation.json", {"title": EVALUATED, **shown})
    facts = {check.what: check.found for check in found}
    write_json(run / "model.json", {"what the table shows": said, **facts})
    write_json(places.out / "results.json", {**result, "settings": settings.identity()})
    page = run / "report.html"
    words = ["report", str(run), "--out", str(page)]
    walk.verb("report", "Curves, table and checks on one page", words, [page], walk.last_line)
    print_table(rows)
    print(f"\n{said}\n")
    for check in found:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.what}: {check.found}")
    return all(check.passed for check in found)


def held_out_tokens(places: Places, settings: Settings) -> np.ndarray:
    """Ids [B, T] of the first rows of both held-out texts."""
    tokenizer = load_tokenizer(places.model("base"))
    rows = []
    for domain in DOMAINS:
        text = read_text(
            domain, places.text(f"{domain}_heldout"), tokenizer, settings.length, COMPARED
        )
        rows += [row["tokens"] for row in text.rows]
    return np.stack(rows)


def print_table(rows: Sequence[results.Row]) -> None:
    cells = [list(results.COLUMNS)]
    for row in rows:
        trained = "-" if row.trainable is None else f"{row.trainable:,}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        cells.append([row.model, f"{row.prose:.2f}", f"{row.code:.2f}", trained, seconds])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    print()
    for number, line in enumerate(cells):
        first, *rest = zip(line, widths, strict=True)
        print(f"{first[0]:<{first[1]}}  " + "  ".join(f"{text:>{w}}" for text, w in rest))
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
