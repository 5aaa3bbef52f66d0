"""The checksum of an array: the same on devices and on the host. (test_frozen.py: what it sees.)"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llamapro_jax import checksum
from llamapro_jax.checksum import checksums, host_checksum


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.int32])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4, 5), (0, 3)])
def test_the_host_gives_what_the_devices_give(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(checksum, "_PIECE", 16)
    array = (100 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)
    expected = checksums({"leaf": jnp.asarray(array)})["leaf"]
    assert host_checksum(array) == expected
    # However it lies in memory.
    assert host_checksum(np.asfortranarray(array)) == expected
