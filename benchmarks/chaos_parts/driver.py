"""`llamapro` in a process whose loss or loader goes wrong at set steps: what no signal can do.

    python benchmarks/chaos_parts/driver.py --nan 7,20 --stall 12 --of 1 -- train CONFIG ...

--nan: the loss of these steps (from 1) is no number. It is so in the compiled program, as a kernel
or a link that gives garbage would have it. --stall: the rows of this step (from 1) never come, in
the process --of. What is replaced are the arguments of the package, not the package.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llamapro_jax import cli  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nan", default="", help="steps, such as 7,20")
    parser.add_argument("--stall", type=int, help="a step")
    parser.add_argument("--of", type=int, default=0, help="number of the process that stalls")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.nan:
        spoil([int(step) for step in args.nan.split(",")])
    if args.stall is not None and int(os.environ.get("JAX_PROCESS_ID", "0")) == args.of:
        stall(args.stall)
    return cli.main(args.command[1:] if args.command[:1] == ["--"] else args.command)


def spoil(steps: list[int]) -> None:
    """The step that the loop compiles has a loss that is NaN at these steps."""
    import jax
    import jax.numpy as jnp

    from llamapro_jax.training import loop
    from llamapro_jax.training import step as steps_module

    build, summed_loss = loop.build_train_step, steps_module.summed_loss

    def build_spoiled(config: Any, plan: Any, run: Any, optimizer: Any) -> Any:
        whole = build(config, plan, run, optimizer)

        def step(state: Any, frozen: Any, batch: Any) -> Any:
            factor = jnp.where(jnp.isin(state.step + 1, jnp.array(steps)), jnp.nan, 1.0)

            def spoiled(*arguments: Any, **options: Any) -> jax.Array:
                return factor * summed_loss(*arguments, **options)

            with mock.patch.object(steps_module, "summed_loss", spoiled):
                return whole(state, frozen, batch)

        return jax.jit(step, donate_argnums=0)

    loop.build_train_step = build_spoiled


def stall(number: int) -> None:
    """The rows of this step never come."""
    from llamapro_jax.data.mixture import Mixture

    rows = Mixture.rows

    def stalled(self: Mixture, step: int, start: int, stop: int) -> Any:
        if step + 1 == number:
            threading.Event().wait()
        return rows(self, step, start, stop)

    Mixture.rows = stalled  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
