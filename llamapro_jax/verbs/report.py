"""Write a run's report: one HTML page with its curves and what it learned and forgot.

The page needs no network and no other file. It reads RUN/metrics.jsonl, and RUN/evaluation.json
when `llamapro evaluate` has written one.
"""

from __future__ import annotations

import argparse

HELP = "write a run's curves and its learning/forgetting table as one HTML page"
EXAMPLE = """\
llamapro report runs/llama2_7b_pro
llamapro report runs/llama2_7b_pro --out report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="directory of a training run")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html)")


def run(args: argparse.Namespace) -> None:
    from llamapro_jax.report import write_report

    print(f"wrote {write_report(args.run, args.out)}")
