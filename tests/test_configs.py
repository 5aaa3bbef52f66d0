"""The shipped configurations: each is the step of its machine, and nothing in them is idle."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import llamapro_jax
from llamapro_jax import config, config_data
from llamapro_jax.architecture import of_run
from llamapro_jax.config import RunConfig, load_config
from llamapro_jax.data.preparation import config as prepare_config
from llamapro_jax.data.preparation.config import PrepareConfig, load_prepare_config
from llamapro_jax.expansion import ExpansionPlan
from llamapro_jax.flops import step_flops
from llamapro_jax.machines import Machine, parse_machine
from llamapro_jax.model.config import ModelConfig
from llamapro_jax.model.weights import (
    block_parameters,
    block_weights,
    outer_weights,
    total_parameters,
)
from llamapro_jax.sharding import AXES, check_batch, check_model, mesh_shape
from llamapro_jax.training.abstract import Arguments, abstract_arguments
from llamapro_jax.training.step import build_train_step

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.stem: path for path in sorted(ROOT.glob("configs/*.yaml"))}
# Those of other verbs than `train` begin with the verb.
VERBS = ("prepare_", "evaluate_")
ONE_GPU = "llama2_7b_pro_one_gpu"
RECIPES = {
    name: path
    for name, path in CONFIGS.items()
    if not name.startswith(("quickstart", *VERBS)) and name != ONE_GPU
}
PREPARATIONS = {name: path for name, path in CONFIGS.items() if name.startswith("prepare_")}
# Of the published model with 8 new blocks, whose own number is the second.
PARAMETERS = {
    "llama2_7b": (8_357_482_496, 1_619_066_880),
    "llama2_13b": (15_553_500_160, 2_537_635_840),
    "llama2_70b": (75_821_883_392, 6_845_235_200),
    "mistral_7b": (8_986_628_096, 1_744_896_000),
    "llama3_8b": (9_775_157_248, 1_744_896_000),
}
MIB = 2**20

each_recipe = pytest.mark.parametrize("name", RECIPES)


def machine_of(name: str) -> Machine:
    """For which the comment at the top of a configuration plans."""
    plan = rf"^#   llamapro plan configs/{name}\.yaml topology=(\S+)$"
    named = re.search(plan, CONFIGS[name].read_text(), re.MULTILINE)
    assert named is not None, f"{name} names no machine"
    return parse_machine(named[1])


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A recipe on the mesh of its machine."""

    run: RunConfig
    config: ModelConfig
    plan: ExpansionPlan
    mesh: AbstractMesh


@functools.cache
def shipped(name: str) -> Shipped:
    """With the remat and the microbatch that need the least, so that `auto` can take any."""
    run = load_config(RECIPES[name], ["training.remat=full", "training.microbatch=1"])
    machine = machine_of(name)
    sizes = mesh_shape(run.mesh, machine.devices, machine.slices)
    device = AbstractDevice(machine.chip.name, None, machine.chip.platform)
    mesh = AbstractMesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        (AxisType.Explicit,) * len(AXES),
        abstract_device=device,
    )
    config, plan = of_run(run)
    return Shipped(run, config, plan, mesh)


@functools.cache
def arguments(name: str) -> Arguments:
    of = shipped(name)
    with jax.sharding.use_abstract_mesh(of.mesh):
        return abstract_arguments(of.config, of.plan, of.run, of.mesh)


# ------------------------------------------------------------------- what is in them


def test_what_is_shipped() -> None:
    pro = {f"{base}_pro" for base in PARAMETERS}
    assert set(RECIPES) == pro | {f"{name}_instruct" for name in pro}


@each_recipe
def test_the_first_training_and_the_second(name: str) -> None:
    run = load_config(RECIPES[name])
    data, optimizer, training = run.data, run.optimizer, run.training
    assert (training.remat, training.microbatch, training.attention) == ("auto",) * 3
    assert run.output == f"runs/{name}" and run.compute_dtype == "bfloat16"
    assert {entry.kind for entry in (*data.sources, *data.eval)} == {"tfds"}
    assert (data.sequence_length, optimizer.schedule) == (4096, "cosine")
    if name.endswith("_instruct"):
        assert run.model == f"runs/{name.removesuffix('_instruct')}"
        assert run.trainable == ("all",)
        assert (data.batch_size, optimizer.learning_rate) == (128, 2e-5)
        assert (optimizer.warmup_ratio, optimizer.weight_decay) == (0.03, 0.0)
    else:
        assert run.trainable == ("new",)
        assert (data.batch_size, training.steps) == (1024, 15900)
        assert (optimizer.warmup_ratio, optimizer.weight_decay) == (0.06, 0.1)
        rates = {"llama2_7b": 2e-4, "llama2_13b": 2e-4, "llama2_70b": 1e-4}
        assert optimizer.learning_rate == rates.get(name.removesuffix("_pro"), 2e-5)


@each_recipe
def test_both_trainings_of_a_model_read_the_rows_of_its_tokenizer(name: str) -> None:
    data = load_config(RECIPES[name]).data
    family = name.partition("_")[0]
    folder = "data" if family == "llama2" else f"data/{family}"
    for entry in (*data.sources, *data.eval):
        assert str(Path(entry.path).parent) == folder


def test_the_recipe_for_one_gpu_takes_a_text_of_your_own() -> None:
    run, machine = load_config(CONFIGS[ONE_GPU]), machine_of(ONE_GPU)
    assert (machine.devices, machine.chip.platform) == (1, "gpu")
    assert run.output == f"runs/{ONE_GPU}" and run.trainable == ("new",)
    assert run.model == load_config(CONFIGS["llama2_7b_pro"]).model
    entries = (*run.data.sources, *run.data.replayed, *run.data.eval)
    assert {entry.kind for entry in entries} == {"text"} and len(entries) == 4
    assert run.data.replay is not None and run.data.replay.share == 0.1


def test_the_replay_in_a_comment_is_one_that_loads() -> None:
    """As written there, for who takes the comment signs away."""
    text = CONFIGS["llama2_7b_pro"].read_text()
    lines = re.findall(r"^  # (( *\w+:| +- ).*)$", text, re.MULTILINE)
    replay = yaml.safe_load("\n".join(line for line, _ in lines))["replay"]
    run = load_config(CONFIGS["llama2_7b_pro"], [f"data.replay={replay}"])
    assert [source.path for source in run.data.replayed] == ["data/replay"]


SOURCED = ("optimizer", "steps", "sequence_length", "batch_size", "weight", "trainable")


def settings(node: yaml.Node, key: str = "") -> Iterator[tuple[str, int]]:
    """(path, line) of each scalar, lines counted from 0."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from settings(value, f"{key}.{name.value}")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from settings(item, key)
    else:
        yield key, node.start_mark.line


@pytest.mark.parametrize("name", [*RECIPES, ONE_GPU])
def test_each_number_says_where_it_is_from(name: str) -> None:
    text = CONFIGS[name].read_text()
    lines = text.splitlines()
    count = 0
    for path, line in settings(yaml.compose(text)):
        if set(path.split(".")) & set(SOURCED):
            assert re.search(r"  # (paper$|not in the paper: .)", lines[line]), lines[line]
            count += 1
    assert count >= 10


@each_recipe
def test_the_commands_make_what_the_configuration_reads(name: str) -> None:
    """They are parsed with those of the documents; here each begins where the last one ended."""
    text, run = RECIPES[name].read_text(), load_config(RECIPES[name])
    convert, expand, *rest = re.findall(r"^#   llamapro (.*)$", text, re.MULTILINE)
    verb, hub_id, converted = convert.split()
    assert verb == "convert" and hub_id.count("/") == 1
    verb, base, expanded, *plan = expand.split()
    assert (verb, base, plan) == ("expand", converted, ["--blocks", str(run.architecture.blocks)])
    pro = name.removesuffix("_instruct")
    assert load_config(RECIPES[pro]).model == expanded
    trainings = [line for line in rest if line.startswith("train ")]
    wanted = [pro, name] if pro != name else [name]
    assert trainings == [f"train configs/{each}.yaml" for each in wanted]


# ------------------------------------------------------------------- what they compute


@each_recipe
def test_parameters(name: str) -> None:
    of = shipped(name)
    total, new = PARAMETERS[of.run.architecture.base]
    assert total_parameters(of.config) == total
    assert of.plan.num_new == 8 and 8 * block_parameters(of.config) == new
    state = arguments(name).state
    trains = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trainable))
    assert trains == (total if of.run.trainable == ("all",) else new)


@each_recipe
def test_model_and_batch_divide_over_the_mesh(name: str) -> None:
    of = shipped(name)
    sizes = dict(of.mesh.shape)
    check_model(of.config, sizes)
    check_batch(of.run.data.batch_size, of.run.data.sequence_length, sizes, "data.batch_size")
    assert of.run.data.sequence_length <= of.config.max_position_embeddings
    if of.run.architecture.base == "llama2_70b":
        assert (sizes["fsdp"], sizes["tensor"]) == (32, 4)


def whole_bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def device_bytes(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


@each_recipe
def test_what_a_device_holds(name: str) -> None:
    """Weights and optimizer state lie over all devices, but for vectors; rows over data x fsdp."""
    of, taken = shipped(name), arguments(name)
    sizes = of.mesh.shape
    leaves = jax.tree_util.tree_leaves_with_path((taken.state, taken.frozen))
    for path, leaf in leaves:
        spread = leaf.shape and device_bytes(leaf) * of.mesh.size == whole_bytes(leaf)
        assert spread or whole_bytes(leaf) < 4 * MIB, (jax.tree_util.keystr(path), leaf)
    for rows in taken.batch.values():
        assert device_bytes(rows) * sizes["data"] * sizes["fsdp"] == whole_bytes(rows)
    memory = sum(device_bytes(leaf) for _, leaf in leaves if leaf.shape)
    assert memory < 0.1 * machine_of(name).chip.hbm_bytes


def arrays(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """(operation, type) of all results whose layout is known.

    Inside of `shard_map` shapes are those of one device; inside of a gather the compiler decides.
    """
    for equation in jaxpr.eqns:
        for result in equation.outvars:
            sharding = getattr(result.aval, "sharding", None)
            if sharding is not None and sharding.mesh.are_all_axes_explicit:
                yield equation.primitive.name, result.aval
        if equation.primitive.name != "shard_map":
            for inner in jaxprs_in_params(equation.params):
                yield from arrays(inner)


@each_recipe
def test_the_step_lowers_for_its_machine(name: str) -> None:
    of, taken = shipped(name), arguments(name)
    with jax.sharding.use_abstract_mesh(of.mesh):
        step = build_train_step(of.config, of.plan, of.run, taken.optimizer)
        traced = step.trace(taken.state, taken.frozen, taken.batch)
        program = traced.lower(lowering_platforms=(machine_of(name).chip.platform,)).as_text()
    assert f"num_partitions = {of.mesh.size}" in program
    # Splash attention: forward, forward again (`full`), and the two of the backward pass.
    assert program.count("@tpu_custom_call") >= 3
    # The largest array that may be whole on a device is one weight, gathered to be multiplied.
    largest = max(w.size(of.config) for w in (*block_weights(of.config), *outer_weights(of.config)))
    sized = [each for each in arrays(traced.jaxpr.jaxpr) if math.prod(each[1].shape) > largest]
    assert len(sized) > 100
    assert not [(name, array.str_short()) for name, array in sized if not any(array.sharding.spec)]


# ------------------------------------------------------------------- no key that nothing reads


def options(cls: type) -> Iterator[tuple[str, str]]:
    """(class, field) of every setting of a configuration, its sections and their items."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield cls.__name__, field.name
        for part in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(part):
                yield from options(part)


def reads(node: ast.AST) -> set[str]:
    """Names of the attributes that some code reads."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Load)
    }


def unread(cls: type, sources: dict[str, str], own: str) -> set[str]:
    """`Class.field` of settings that no source reads.

    own: the source of the configuration itself. What its checks read counts for nothing; what
    another of its methods reads counts when a source reads the method.
    """
    read = set().union(*(reads(ast.parse(text)) for text in sources.values()))
    for node in ast.walk(ast.parse(own)):
        if isinstance(node, ast.FunctionDef) and node.name in read - {"problems"}:
            read |= reads(node)
    return {f"{owner}.{field}" for owner, field in options(cls) if field not in read}


def own_and_others(*modules: Any) -> tuple[str, dict[str, str]]:
    """The source of the modules that define a configuration, and those of the package's others."""
    own = [Path(module.__file__) for module in modules]
    files = [path for path in Path(llamapro_jax.__file__).parent.rglob("*.py") if path not in own]
    text = "\n".join(path.read_text() for path in own)
    return text, {str(path): path.read_text() for path in files}


@pytest.mark.parametrize(
    ("cls", "modules", "at_least"),
    [(RunConfig, (config, config_data), 50), (PrepareConfig, (prepare_config,), 12)],
)
def test_every_setting_is_read_somewhere(cls: type, modules: tuple, at_least: int) -> None:
    own, others = own_and_others(*modules)
    assert len(list(options(cls))) > at_least
    assert unread(cls, others, own) == set()


def test_a_setting_that_nothing_reads_is_found() -> None:
    own, others = own_and_others(config, config_data)

    @dataclasses.dataclass(frozen=True)
    class Longer(RunConfig):
        frozen_parameters: str = "all"

    assert unread(Longer, others, own) == {"Longer.frozen_parameters"}
    # What only a check reads is not read: without its one reader the rate of decay is idle.
    without = {
        name: text
        for name, text in others.items()
        if not {"decay_ratio", "decay"} & reads(ast.parse(text))
    }
    assert "OptimizerConfig.decay_ratio" in unread(RunConfig, without, own)


# ------------------------------------------------------------------- the data sets


@pytest.mark.parametrize("name", PREPARATIONS)
def test_what_is_prepared_is_what_the_recipe_reads(name: str) -> None:
    prepared = load_prepare_config(PREPARATIONS[name])
    run = load_config(CONFIGS[name.replace("prepare_llama", "llama2_7b")])
    splits = {
        str(prepared.target(source)): ("train", "validation") if source.held_out else ("train",)
        for source in prepared.sources
    }
    read = {entry.path: entry for entry in (*run.data.sources, *run.data.eval)}
    for entry in (*run.data.sources, *run.data.eval):
        # An Instruct run also reads what was prepared for the first training.
        if entry.path in splits:
            assert entry.split in splits[entry.path], entry
        assert entry.path in splits or name.endswith("_instruct"), entry
    unread_sets = {Path(path).name for path in splits} - {Path(path).name for path in read}
    assert unread_sets <= {"replay"}
    assert prepared.sequence_length == run.data.sequence_length
    kinds = {source.kind for source in prepared.sources}
    assert kinds == ({"chat"} if name.endswith("_instruct") else {"text"})
    assert re.search(
        rf"^#   llamapro prepare configs/{name}\.yaml$", PREPARATIONS[name].read_text(), re.M
    )


# ------------------------------------------------------------------- the table of them


def table_row(name: str) -> str:
    """What docs/recipes.md says of a recipe."""
    of = shipped(name)
    run, machine = load_config(RECIPES[name]), machine_of(name)
    total, new = PARAMETERS[run.architecture.base]
    tokens = run.training.steps * run.data.batch_size * run.data.sequence_length
    flops = step_flops(of.config, of.plan, run.trainable, run.data.sequence_length).total
    days = tokens * flops / (0.5 * machine.chip.peak_flops * machine.devices) / 86400
    trains = total if run.trainable == ("all",) else new
    cells = (
        f"[`{name}`](../configs/{name}.yaml)",
        f"{total / 1e9:.2f} B",
        f"{trains / 1e9:.2f} B",
        f"{run.optimizer.learning_rate:.0e}".replace("e-0", "e-"),
        f"{run.training.steps:,} x {run.data.batch_size:,}",
        f"{tokens / 1e9:.1f} B",
        f"{flops / 1e9:.1f} GF",
        machine.name,
        f"{days:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


@each_recipe
def test_the_documentation_of_the_recipes_is_current(name: str) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    assert table_row(name) in page
