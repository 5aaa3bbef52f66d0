"""The text of a compiled program as instructions, and how often each runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from llamapro_jax.hlo import Array, Instruction, Program, arrays, read_program

# A loop as the TPU compiler writes one: no note of its trips, the condition and the counter in
# fusions, an attribute that is broken into lines.
LOOP = """\
HloModule jit_f, is_scheduled=true

%lt_computation (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[]{:T(128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%p0, %p1), direction=DIRECTION
}

%add_computation (p.2: s32[], p.3: s32[]) -> s32[] {
  %p.2 = s32[]{:T(128)} parameter(0)
  %p.3 = s32[]{:T(128)} parameter(1)
  ROOT %add = s32[]{:T(128)} add(%p.2, %p.3)
}

%body (state: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = s32[]{:T(128)} copy(%i)
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} fusion(%copy.1, %step), kind=kLoop, calls=%add_computation
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %y = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/while/body/kernel_of_ours/pallas_call" stack_frame_id=1}
  %bound = s32[]{:T(128)} get-tuple-element(%state), index=2
  ROOT %tuple = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%next, %y, %bound)
}

%condition (state.1: (s32[], f32[8,128], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %bound.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=2
  ROOT %compare = pred[]{:T(512)} fusion(%i.1, %bound.1), kind=kLoop, calls=%lt_computation
}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %bound.2 = s32[]{:T(128)} constant(10)
  %tuple.1 = (s32[], f32[8,128], s32[]) tuple(%start, %x.1, %bound.2)
  %while = (s32[], f32[8,128], s32[]) while(%tuple.1), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def loop(start: int = 0, step: int = 1, direction: str = "LT") -> Program:
    text = LOOP.replace("START", str(start)).replace("STEP", str(step))
    return read_program(text.replace("DIRECTION", direction))


def compiled(function: jax.stages.Wrapped, *arguments: jax.Array) -> Program:
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
    ("start", "step", "direction", "trips"),
    [(0, 1, "LT", 10), (2, 1, "LT", 8), (0, 3, "LT", 4), (0, 3, "LE", 4), (0, 5, "LE", 3)],
)
def test_trips_from_the_condition(start: int, step: int, direction: str, trips: int) -> None:
    assert loop(start, step, direction).times["body"] == trips


def test_a_loop_whose_trips_are_not_known() -> None:
    with pytest.raises(ValueError, match="no known trip count of the loop while"):
        _ = loop(direction="NE").times
    with pytest.raises(ValueError, match="trip count"):
        _ = loop(step=0).times


def test_trips_of_a_loop_in_a_loop() -> None:
    """The bound and the start of the inner one come through the state of the outer one."""
    inner = LOOP.replace("START", "0").replace("STEP", "1").replace("DIRECTION", "LT")
    outer = """\
%outer_body (s: (s32[], f32[8,128], s32[], s32[])) -> (s32[], f32[8,128], s32[], s32[]) {
  %s = (s32[], f32[8,128], s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %j.1 = s32[] add(%one, %j)
  %z = f32[8,128] get-tuple-element(%s), index=1
  %zero = s32[] get-tuple-element(%s), index=2
  %limit = s32[] get-tuple-element(%s), index=3
  %tuple.2 = (s32[], f32[8,128], s32[]) tuple(%zero, %z, %limit)
  %while.1 = (s32[], f32[8,128], s32[]) while(%tuple.2), condition=%condition, body=%body
  %z.1 = f32[8,128] get-tuple-element(%while.1), index=1
  ROOT %tuple.3 = (s32[], f32[8,128], s32[], s32[]) tuple(%j.1, %z.1, %zero, %limit)
}

%outer_condition (s.1: (s32[], f32[8,128], s32[], s32[])) -> pred[] {
  %s.1 = (s32[], f32[8,128], s32[], s32[]) parameter(0)
  %j.2 = s32[] get-tuple-element(%s.1), index=0
  %three = s32[] constant(3)
  ROOT %compare.1 = pred[] compare(%three, %j.2), direction=GT
}

"""
    head, entry = inner.split("ENTRY")
    entry = entry.replace("tuple(%start, %x.1, %bound.2)", "tuple(%start, %x.1, %start, %bound.2)")
    entry = entry.replace("condition=%condition, body=%body", "condition=%outer_condition, "
                          "body=%outer_body")  # fmt: skip
    program = read_program(head + outer + "ENTRY" + entry)
    assert program.times["outer_body"] == 3
    assert program.times["body"] == 30


def test_an_attribute_that_is_broken_into_lines() -> None:
    kernel = loop().computations["body"].instructions["y"]
    assert kernel.op_name == "jit(f)/while/body/kernel_of_ours/pallas_call"
    assert kernel.operands == ("x",)
    assert kernel.results == (Array("f32", (8, 128)),)


def test_inner_values_of_a_fusion_are_not_in_memory() -> None:
    assert loop().fused == {"lt_computation", "add_computation"}


@pytest.mark.parametrize(
    ("text", "found", "size"),
    [
        ("f32[]", [("f32", ())], 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", [("bf16", (2, 3))], 12),
        ("(pred[5], /*index=1*/s4[6]{0}, token[])", None, 8),
        ("f8e4m3fn[7]", [("f8e4m3fn", (7,))], 7),
        ("c64[2]", [("c64", (2,))], 16),
    ],
)
def test_types(text: str, found: list[tuple[str, tuple[int, ...]]] | None, size: int) -> None:
    results = arrays(text)
    if found is not None:
        assert [(array.dtype, array.dims) for array in results] == found
    assert Instruction("x", results, "copy", "", "").bytes == size


def test_a_program_as_compiled_here() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]), None

        return jax.lax.scan(body, x, w)[0]

    program = compiled(f, jnp.ones((4, 8)), jnp.ones((5, 8, 8)))
    products = [
        program.times[computation.name]
        for instruction, computation in program.instructions()
        if instruction.operation == "dot"
    ]
    assert products == [15]


def test_both_branches_count() -> None:
    def f(take: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(take, lambda x: x @ x, lambda x: (x @ x) @ x, x)

    program = compiled(f, jnp.array(True), jnp.ones((64, 64)))
    dots = sum(
        program.times[computation.name]
        for instruction, computation in program.instructions()
        if instruction.operation == "dot"
    )
    assert dots == 3


def test_what_is_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("module @jit_f {\n}\n")
