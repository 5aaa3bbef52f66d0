from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamapro_jax import typed_yaml
from llamapro_jax.config import (
    DataConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
    changed,
    load_config,
    save_config,
    validate,
)
from llamapro_jax.errors import UserError
from llamapro_jax.typed_yaml import option

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Leaf:
    name: str = option("a name")
    size: float = option("a size", 1.0)


@dataclasses.dataclass(frozen=True)
class Tree:
    text: str = option("t", "a")
    count: int | None = option("c", None)
    ratio: float = option("r", 0.5)
    flag: bool = option("f", False)
    mode: Literal["on", "off", "slow"] = option("m", "on")
    words: tuple[str, ...] = option("w", ())
    leaves: tuple[Leaf, ...] = option("l", ())
    table: dict[str, float] | None = option("d", None)
    either: int | tuple[str, ...] = option("e", 0)
    leaf: Leaf | None = option("o", None)


def load(tmp_path: Path, text: str, *overrides: str, cls: type = Tree):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return typed_yaml.load(cls, path, list(overrides))


def problems_of(tmp_path: Path, text: str, *overrides: str, cls: type = Tree) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides, cls=cls)
    lines = str(caught.value).replace(str(tmp_path) + "/", "").splitlines()
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


MINIMAL = """\
model: models/small
output: runs/one
data:
  sequence_length: 64
  batch_size: 8
  sources:
    - name: code
      path: code.txt
    - {name: prose, path: prose.txt, weight: 2}
  eval: [{name: prose, path: held_out.txt}]
training:
  steps: 100
"""


# ------------------------------------------------------------------- reading by type


def test_the_field_decides_how_a_text_is_read(tmp_path):
    tree = load(
        tmp_path,
        "text: on\ncount: 1_000\nratio: 2e-4\nflag: on\nmode: off\nwords: one\n"
        "leaves: [{name: 12, size: 3}]\ntable: {a: 1e3, on: .5}\neither: [1, no]\n",
    )
    assert tree == Tree(
        text="on", count=1000, ratio=2e-4, flag=True, mode="off", words=("one",),
        leaves=(Leaf("12", 3.0),), table={"a": 1000.0, "on": 0.5}, either=("1", "no"),
    )  # fmt: skip
    assert isinstance(tree.leaves[0].size, float)


def test_null_is_a_value_only_where_the_type_has_it(tmp_path):
    assert load(tmp_path, "count: null\ntable: ~\nleaf:\n") == Tree()
    assert load(tmp_path, 'text: "null"\n').text == "null"
    assert problems_of(tmp_path, "text: null\n") == ["run.yaml:1: text: expected a text, got null."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("count: 1.5", "count: expected a whole number or null, got '1.5'."),
        ("count: '3'", "count: expected a whole number or null, got '3' in quotes."),
        ("ratio: fast", "ratio: expected a number, got 'fast'."),
        ("ratio: .inf", "ratio: expected a number, got '.inf'."),
        ("flag: 1", "flag: expected true or false, got '1'."),
        ("mode: slwo", "mode: expected one of on, off, slow, got 'slwo'. Did you mean 'slow'?"),
        ("text: [a]", "text: expected a text, got a list."),
        ("words: {a: b}", "words: expected a list, each a text, got a mapping."),
        ("leaves: a", "leaves: expected a list of mappings, got 'a'."),
        ("leaves: [{}]", "leaves.0.name: is missing; it must be a text."),
        ("table: {a: b}", "table.a: expected a number, got 'b'."),
        ("either: x: 1", "is not YAML (mapping values are not allowed here)."),
        ("either: {a: 1}", "either: expected a whole number or a list, each a text, got a mapping"),
        ("leaf: 3", "leaf: expected a mapping with the keys name, size, got '3'."),
        ("text: !include a", "the tag '!include' means nothing here; remove it."),
        ("[a]: b", "a key must be a text."),
    ],
)
def test_a_wrong_value_names_its_line_field_and_type(tmp_path, line, message):
    (problem,) = problems_of(tmp_path, f"# comment\n{line}\n")
    assert problem.startswith("run.yaml:2: ")
    assert message in problem


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    text = MINIMAL.replace("sources:", "sorces:").replace("steps: 100", "steps: many")
    text += "learning_rate: 1\nseed: 1\nseed: 2\nzzz: 1\n"
    problems = problems_of(tmp_path, text, cls=RunConfig)
    assert problems[0] == "run.yaml:3: data.sources: is missing; it must be a list of mappings."
    assert problems[1] == "run.yaml:6: data.sorces: unknown key. Did you mean 'sources'?"
    assert problems[2] == "run.yaml:12: training.steps: expected a whole number, got 'many'."
    assert problems[3] == (
        "run.yaml:13: learning_rate: unknown key. It exists as 'optimizer.learning_rate'."
    )
    assert problems[4] == "run.yaml:15: 'seed' is given twice (first at run.yaml:14)."
    assert problems[5].startswith("run.yaml:16: zzz: unknown key. Known: model, output, data,")
    assert len(problems) == 6


def test_missing_keys_of_missing_sections_are_named():
    with pytest.raises(UserError) as caught:
        load_config(None, ["model=a", "data.batch_size=2"])
    for name in ("output", "data.sequence_length", "data.sources", "training.steps"):
        assert f" {name}: is missing" in str(caught.value)
    assert "model:" not in str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(UserError, match=r"absent.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(UserError, match=r"latin.yaml: is not UTF-8 \(.*byte 7\)"):
        load_config(tmp_path / "latin.yaml")
    assert "run.yaml:2: is not YAML" in problems_of(tmp_path, "a: 1\nb: ]\n")[0]
    assert "expected keys and values" in problems_of(tmp_path, "- a\n")[0]
    assert "is not YAML" in problems_of(tmp_path, "a: 1\n---\nb: 1\n")[0]
    assert "is not YAML" in problems_of(tmp_path, "a: \x07\n")[0]
    loop = problems_of(tmp_path, "words: &w [*w]\n")
    assert "run.yaml:1: an alias refers to the value that contains it." in loop


# ------------------------------------------------------------------- overrides


def test_overrides_change_scalars_items_and_sections(tmp_path):
    config = load(
        tmp_path, MINIMAL, "optimizer.learning_rate=3e-4", "data.sources.0.weight=2", "trainable="
        "[head, new]", "data.eval=[]", "optimizer.clip_norm=null", "output=runs/a=b",
        "data.cache_directory=on", cls=RunConfig,
    )  # fmt: skip
    assert config.optimizer.learning_rate == 3e-4
    assert [s.weight for s in config.data.sources] == [2.0, 2.0]
    assert config.trainable == ("new", "head")
    assert config.data.eval == ()
    assert config.optimizer.clip_norm is None
    assert config.output == "runs/a=b"
    assert config.data.cache_directory == "on"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=2", "optimizer.lr: unknown key."),
        ("optimizer.learning_rat=2", "unknown key. Did you mean 'learning_rate'?"),
        ("data.sources.2.weight=2", "data.sources has 2 items, counted from 0; no '2'."),
        ("data.sources.code.weight=2", "data.sources has 2 items, counted from 0; no 'code'."),
        ("training.steps=x", "training.steps: expected a whole number, got 'x'."),
        ("data.sources.1.weight=-1", "data.sources.1.weight: must be positive, is -1.0."),
        ("model.path=2", "model is 'models/small', not a section with keys."),
        ("seed", "is not of the form key.path=value."),
        ("seed..x=1", "is not of the form key.path=value."),
        ("output=[a", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    (problem,) = problems_of(tmp_path, MINIMAL, override, cls=RunConfig)
    assert problem.startswith(f"override {override!r}: ")
    assert message in problem


def test_an_override_of_an_item_of_an_absent_list_says_both(tmp_path):
    override = "data.sorces.0.weight=2"
    where = f"override {override!r}: data.sorces"
    assert problems_of(tmp_path, MINIMAL, override, cls=RunConfig) == [
        f"{where} has no item 0.",
        f"{where}: unknown key. Did you mean 'sources'?",
    ]


# ------------------------------------------------------------------- dump

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LEAF = st.builds(Leaf, st.text(), FINITE)
TREE = st.builds(
    Tree, st.text(), st.none() | st.integers(), FINITE, st.booleans(),
    st.sampled_from(["on", "off", "slow"]), st.lists(st.text()).map(tuple),
    st.lists(LEAF, max_size=2).map(tuple), st.none() | st.dictionaries(st.text(), FINITE),
    st.integers() | st.lists(st.text()).map(tuple), st.none() | LEAF,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(TREE)
def test_a_dump_loads_back_equal(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("dump") / "tree.yaml"
    path.write_text(typed_yaml.dump(tree), encoding="utf-8", newline="")
    assert typed_yaml.load(Tree, path) == tree


def test_a_saved_configuration_is_whole_and_loads_back(tmp_path):
    config = load(tmp_path, MINIMAL, "optimizer.learning_rate=2e-4", cls=RunConfig)
    save_config(config, tmp_path / "run" / "config.yaml")
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert "eps: 1.0e-08" in text and "loss_chunk: 1024" in text


# ------------------------------------------------------------------- the run's own rules


def small(**top) -> RunConfig:
    data = DataConfig(64, 8, (SourceConfig("a", "a.txt"),))
    values = {"model": "m", "output": "o", "data": data, "training": TrainingConfig(steps=100)}
    return RunConfig(**{**values, **top})


@pytest.mark.parametrize(
    ("given_parts", "parts"),
    [
        ("new", ("new",)),
        ("all", ("all",)),
        ("[norms, new, embed]", ("new", "embed", "norms")),
    ],
)
def test_trainable_is_normalised(tmp_path, given_parts, parts):
    config = load(tmp_path, f"{MINIMAL}trainable: {given_parts}\n", cls=RunConfig)
    assert config.trainable == parts
    assert small(trainable=parts[0]).trainable == parts[:1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainable=[all, new]", "trainable: 'all' stands alone"),
        ("trainable=[embed]", "trainable: needs 'new'"),
        ("trainable=[]", "trainable: needs 'new'"),
        ("trainable=[new, heads]", "'heads' is no part of a model. Did you mean 'head'?"),
        ("trainable=[new, new]", "names a part twice"),
        ("model=''", "model: must not be empty"),
        ("seed=-1", "seed: must not be negative, is -1."),
        ("training.microbatch=3", "microbatch: 3 does not divide data.batch_size, 8."),
        ("training.microbatch=0", "microbatch: must be positive, is 0."),
        ("training.save_every=0", "save_every: must be positive, is 0."),
        ("training.loss_chunk=0", "loss_chunk: must be positive"),
        ("optimizer.learning_rate=0", "learning_rate: must be positive, is 0.0."),
        ("optimizer.clip_norm=0", "clip_norm: must be positive"),
        ("optimizer.weight_decay=-0.1", "weight_decay: must not be negative"),
        ("optimizer.b2=1", "b2: must be at least 0 and below 1, is 1.0."),
        ("optimizer.final_ratio=2", "final_ratio: must be between 0 and 1, is 2.0."),
        ("optimizer.warmup_steps=100", "warmup_steps: 100 warmup steps leave none"),
        ("optimizer.warmup_ratio=1", "warmup_ratio: 100 warmup steps leave none"),
        ("data.sources=[]", "data.sources: names no text to train on"),
        ("data.sources.1.name=code", "sources.1.name: 'code' names two entries"),
        ("data.sources.1.name=a/b", "sources.1.name: 'a/b' must be letters"),
        ("data.eval.0.path=prose.txt", "eval.0.path: 'prose.txt' (train) is trained on"),
        ("data.sources.0.path=''", "sources.0.path: must not be empty"),
        ("data.sources.0.weight=row", "weight: expected a number or one of rows, got 'row'"),
        ("data.sources.0.weight=rows", "sources.1.weight: 2.0 stands beside a weight 'rows'"),
        ("data.sources.0.kind=csv", "one of text, code, chat, tfds, datasets, got 'csv'"),
        ("data.sources.0.template=a.jinja", "which kind 'text' does not read; set kind to 'chat'"),
        ("data.sources.0={name: a, path: a, kind: chat, field: x}", "kind 'chat' does not read"),
        ("data.sources.0={name: a, path: a, kind: code, field: x}", "kind 'code' does not read"),
        ("data.eval.0.template=tokenizer", "eval.0.template: is 'tokenizer', which kind 'text'"),
        ("data.replay={share: 0, sources: [{name: r, path: r}]}", "replay.share: must be above 0"),
        ("data.replay={share: 1, sources: [{name: r, path: r}]}", "and below 1, is 1.0; null for"),
        ("data.replay={share: 0.1, sources: []}", "replay.sources: names no text to replay"),
        (
            "data.replay={share: 0.1, sources: [{name: code, path: r}]}",
            "replay.sources.0.name: 'code' is a name in sources too",
        ),
        (
            "data.replay={share: 0.1, sources: [{name: r, path: held_out.txt}]}",
            "eval.0.path: 'held_out.txt' (train) is trained on: r has 'held_out.txt'",
        ),
        ("tracking.wandb_project=''", "wandb_project: must not be empty"),
    ],
)
def test_values_that_make_no_run_are_refused(tmp_path, override, message):
    (problem,) = problems_of(tmp_path, MINIMAL, override, cls=RunConfig)
    assert message in problem


@pytest.mark.parametrize(
    ("trained", "held_out", "refused"),
    [
        (("a.txt", "train"), ("./x/../a.txt", "train"), True),
        (("a.txt", "train"), ("b.txt", "train"), False),
        (("a.txt", "train"), ("a.txt", "train[:10%]"), True),
        (("a.txt", "train[:]"), ("a.txt", "train[5:]"), True),
        (("a.txt", "train[:90%]"), ("a.txt", "train[90%:]"), False),
        (("a.txt", "train[:91%]"), ("a.txt", "train[90%:]"), True),
        (("a.txt", "train[10:20]"), ("a.txt", "train[15:30]"), True),
        (("a.txt", "train[10:20]"), ("a.txt", "train[20:30]"), False),
        (("a.txt", "train[:20]"), ("a.txt", "train[50%:]"), False),
        (("a.txt", "train"), ("a.txt", "test"), False),
        (("a.txt", "train[-5:]"), ("a.txt", "train[-5:]"), True),
        (("a.txt", "train[-5:]"), ("a.txt", "train[:5]"), False),
    ],
)
def test_a_held_out_text_that_is_trained_on_is_refused(tmp_path, trained, held_out, refused):
    def entry(name, path, split):
        return f"{{name: {name}, path: {path}, split: '{split}'}}"

    overrides = [
        f"data.sources=[{entry('seen', *trained)}]",
        f"data.eval=[{entry('unseen', *held_out)}]",
    ]
    if not refused:
        load(tmp_path, MINIMAL, *overrides, cls=RunConfig)
        return
    (problem,) = problems_of(tmp_path, MINIMAL, *overrides, cls=RunConfig)
    assert "is trained on: seen has 'a.txt'" in problem


def test_replay_and_weights_by_rows(tmp_path):
    replay = "data.replay={share: 0.1, sources: [{name: web, path: web, weight: rows}]}"
    config = load(tmp_path, MINIMAL, replay, "data.sources.0.weight=rows",
                  "data.sources.1.weight=rows", cls=RunConfig)  # fmt: skip
    assert config.data.replay.share == 0.1
    assert [s.name for s in config.data.replayed] == ["web"]
    assert {s.weight for s in (*config.data.sources, *config.data.replayed)} == {"rows"}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load(tmp_path, MINIMAL, cls=RunConfig).data.replayed == ()


def test_rules_between_settings(tmp_path):
    wsd = ["optimizer.schedule=wsd", "optimizer.warmup_ratio=0.5", "optimizer.decay_ratio=0.6"]
    (problem,) = problems_of(tmp_path, MINIMAL, *wsd, cls=RunConfig)
    assert "warmup (50 steps) and decay (60) are longer than training.steps, 100" in problem
    never = ["training.eval_every=5", "data.eval=[]"]
    (problem,) = problems_of(tmp_path, MINIMAL, *never, cls=RunConfig)
    assert "data.eval names no held-out text" in problem
    tfds = "data.eval=[{name: a, path: d, kind: tfds}]"
    source = "data.sources.0={name: a, path: d, kind: tfds}"
    assert "'d' (train) is trained on" in problems_of(tmp_path, MINIMAL, tfds, source,
                                                      cls=RunConfig)[0]  # fmt: skip
    load(tmp_path, MINIMAL, tfds.replace("}", ", split: test}"), source, cls=RunConfig)


def test_a_configuration_made_in_python_is_validated_too(tmp_path):
    validate(small())
    bad = small(training=TrainingConfig(steps=0), seed=-1)
    with pytest.raises(UserError, match=r"2 problems:\n  seed: must not be.*\n  training.steps: "):
        validate(bad)
    with pytest.raises(UserError, match="seed"):
        save_config(bad, tmp_path / "config.yaml")
    assert not (tmp_path / "config.yaml").exists()


def test_warmup_in_steps_wins_over_the_ratio(tmp_path):
    optimizer = load(tmp_path, MINIMAL, cls=RunConfig).optimizer
    assert optimizer.warmup(15900) == 954
    assert dataclasses.replace(optimizer, warmup_steps=0).warmup(15900) == 0


def test_changed_names_what_a_resumed_run_may_not_change(tmp_path):
    before = load(tmp_path, MINIMAL, cls=RunConfig)
    harmless = ["training.log_every=1", "training.eval_every=7", "training.save_every=3"]
    harmless += ["training.keep=9", "tracking.tensorboard=off", "output=elsewhere"]
    harmless += ["data.cache_directory=/tmp/cache"]
    assert changed(before, load(tmp_path, MINIMAL, *harmless, cls=RunConfig)) == []
    after = load(
        tmp_path, MINIMAL, "training.steps=200", "data.sources.1.weight=3", "trainable=all",
        "data.eval=[]", "optimizer.clip_norm=null", cls=RunConfig,
    )  # fmt: skip
    lines = changed(before, after)
    assert "training.steps: 100 -> 200" in lines
    assert "data.sources.1.weight: 2.0 -> 3.0" in lines
    assert "trainable: [new] -> [all]" in lines
    assert "optimizer.clip_norm: 1.0 -> null" in lines
    assert any(line.startswith("data.eval") for line in lines)


# ------------------------------------------------------------------- files of the repository


RUNS = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if not path.stem.startswith(("prepare_", "evaluate_"))
]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_configuration_of_the_repository_loads(path):
    load_config(path)


def test_the_published_recipe():
    config = load_config(ROOT / "configs" / "llama2_7b_pro.yaml")
    optimizer = config.optimizer
    assert (config.data.batch_size, config.data.sequence_length) == (1024, 4096)
    assert config.training.steps == 15900 and optimizer.warmup(15900) == 954
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (2e-4, 0.1, 1)
    assert [s.weight for s in config.data.sources] == [1.0, 1.5]
    mistral = load_config(ROOT / "configs" / "mistral_7b_pro.yaml")
    assert mistral.optimizer.learning_rate == 2e-5


def test_the_documentation_of_the_configuration_is_current():
    script = ROOT / "docs" / "generate_configuration.py"
    spec = importlib.util.spec_from_file_location("generate_configuration", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == module.configuration_markdown(), "run: python docs/generate_configuration.py"


def test_every_setting_is_documented():
    rows = list(typed_yaml.option_rows(RunConfig))
    assert len({row.path for row in rows}) == len(rows) > 40
    assert all(re.fullmatch(r".{5,}\.", row.doc) for row in rows)
