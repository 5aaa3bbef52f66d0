"""Say whether a run fits a machine, and how fast it can be there, without having the machine.

The training step of CONFIG is lowered and compiled for the topology: v5e-4, v5p-128, v6e-16,
tpu7x-8, 2xv5e-16 (two slices), h100-8, h200-1, cpu, cpu-8. TPUs need the extra llamapro_jax[tpu],
GPUs llamapro_jax[cuda12]; neither needs the hardware. Without a topology it is this machine's CPU.
No weights are read: of a model that is not here yet, `architecture` in CONFIG says what it is.
Times are bounds from published rates; nothing is measured. A compile takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamapro_jax.capacity import Assessment

HELP = "will it fit, and how fast: compile for a machine that is not here"
EXAMPLE = """\
llamapro plan configs/llama2_7b_pro.yaml topology=v5e-4
llamapro plan configs/llama2_7b_pro.yaml topology=v5p-128 training.remat=minimal --json"""

TOPOLOGY = "topology="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides",
        metavar="topology=NAME | key.path=value",
        nargs="*",
        help="the machine; a setting that differs from CONFIG",
    )
    parser.add_argument("--json", action="store_true", help="one flat JSON object, for scripts")


def run(args: argparse.Namespace) -> int:
    from llamapro_jax.config import load_config
    from llamapro_jax.errors import UserError
    from llamapro_jax.machines import parse_machine
    from llamapro_jax.topology import prepare_environment

    names = [o.removeprefix(TOPOLOGY) for o in args.overrides if o.startswith(TOPOLOGY)]
    if len(names) > 1:
        raise UserError(f"topology: is given twice: {', '.join(names)}.")
    machine = parse_machine(names[0] if names else "cpu")
    config = load_config(args.config, [o for o in args.overrides if not o.startswith(TOPOLOGY)])
    prepare_environment(machine)

    from llamapro_jax.architecture import of_run
    from llamapro_jax.capacity import assess

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    model, plan = of_run(config)
    assessment = assess(config, model, plan, machine, report)
    if args.json:
        print(json.dumps(assessment.as_json(), indent=1))
    else:
        print_table(assessment)
    return 0


def print_table(assessment: Assessment) -> None:
    """The same figures for people."""
    from rich.console import Console
    from rich.table import Table

    from llamapro_jax.capacity_table import sections

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    for title, rows in sections(assessment):
        table = Table(
            title=title, title_justify="left", show_header=False, box=None, padding=(0, 2)
        )
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
