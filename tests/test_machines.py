"""Names of machines, and what they stand for."""

from __future__ import annotations

import pytest

from llamapro_jax.errors import UserError
from llamapro_jax.machines import CHIPS, GIB, machine_names, parse_machine


@pytest.mark.parametrize(
    ("name", "devices", "shape", "slices"),
    [
        ("v5e-4", 4, (2, 2), 1),
        ("v6e-16", 16, (4, 4), 1),
        # Names of v4, v5p and TPU7x count TensorCores, two a chip.
        ("v5p-128", 64, (4, 4, 4), 1),
        ("v4-8", 4, (2, 2, 1), 1),
        # Each half of a TPU7x chip is a device.
        ("tpu7x-8", 8, (2, 2, 1), 1),
        ("2xv5e-16", 32, (4, 4), 2),
        ("h200-1", 1, (1, 1), 1),
        ("h100-8", 8, (1, 8), 1),
        ("h100-16", 16, (2, 8), 1),
        ("cpu", 1, (1,), 1),
        ("cpu-8", 8, (8,), 1),
    ],
)
def test_names(name: str, devices: int, shape: tuple[int, ...], slices: int) -> None:
    machine = parse_machine(name)
    assert (machine.devices, machine.shape, machine.slices) == (devices, shape, slices)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5-4", r"not known\. Did you mean 'v5e-4'.*Known: v4-\{8,16"),
        ("v5e-5", r"of v5e there are v5e-1, v5e-4, .*counts chips"),
        ("v5p-4", r"of v5p there are v5p-8, .*counts TensorCores"),
        ("v5p", r"of v5p there are v5p-8"),
        ("h100-12", r"of h100 there are h100-1, .*counts GPUs"),
        ("2xh100-8", "only TPUs come in slices"),
        ("0xv5e-4", "not known"),
        ("cpu-0", "cpu-1 to cpu-64"),
        ("", "not known"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_machine(name)


def test_every_name_listed_is_one() -> None:
    names = machine_names()
    assert len(names) > 50
    for name in names:
        assert parse_machine(name).name == name


def test_bandwidth_within_a_slice() -> None:
    # Two links of four on a 2x2 of v5e, which has no axis long enough to go round.
    assert parse_machine("v5e-4").interconnect_bandwidth() == 2 * 50e9
    assert parse_machine("v5e-16").interconnect_bandwidth() == 4 * 50e9
    assert parse_machine("v5p-128").interconnect_bandwidth() == 6 * 100e9
    assert parse_machine("h100-8").interconnect_bandwidth() == 450e9
    assert parse_machine("h100-16").interconnect_bandwidth() == 50e9


def test_next_larger_machines() -> None:
    assert parse_machine("v5e-4").next_larger() == ["v5e-8", "v5e-16"]
    assert parse_machine("2xv5p-64").next_larger() == ["2xv5p-128", "2xv5p-256"]
    assert parse_machine("h100-8").next_larger() == ["h100-16", "h100-32"]
    assert parse_machine("v6e-256").next_larger() == []


def test_chips_as_published() -> None:
    assert CHIPS["v5e"].hbm_bytes == 15.75 * GIB
    assert CHIPS["v6e"].hbm_bytes == 31.25 * GIB
    assert {name: chip.peak_flops / 1e12 for name, chip in CHIPS.items() if name != "cpu"} == {
        "v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 1153.5,
        "a100": 312, "h100": 989, "h200": 989,
    }  # fmt: skip
