"""Faults injected into training runs, and whether anything is lost.

Real processes, signals and files: a small expanded model is trained by `llamapro train`, on a mesh
of four devices in one, two or four processes, as a launcher would start them, and started again as
their exit status says. On the way it takes faults: signals in every phase, a stalled loader, NaN,
bad records, full disks, damaged files of checkpoints, a second writer, another configuration. Each
run is then compared with one that nothing happened to: every loss of its log, and every bit of its
weights and of its optimizer. Exit status 1 when anything is lost.

    python benchmarks/chaos.py --faults 200
    python benchmarks/chaos.py --faults 200 --work-directory /tmp/chaos --resume
    python benchmarks/chaos.py --faults 20 --seed 7
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed.
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks.chaos_parts import plan, results  # noqa: E402
from benchmarks.chaos_parts.campaign import Campaign  # noqa: E402
from benchmarks.chaos_parts.group import Hangs  # noqa: E402
from benchmarks.chaos_parts.lap import Failed, Surroundings  # noqa: E402
from benchmarks.chaos_parts.material import STEPS, Material  # noqa: E402
from benchmarks.chaos_parts.sweep import sweep  # noqa: E402

# Numbers of processes, each as often as it is to be chosen. Four start slowly on two cores.
LAYOUTS = (1, 1, 1, 1, 2, 2, 2, 2, 4)
# A short campaign restores a checkpoint with so many damages, a long one with all.
SHORT, SHORT_SWEEP = 50, 60


def main() -> int:
    args = parse_arguments()
    if args.table_from is not None:
        found = results.Results(args.table_from)
        found.only_compared()
        return report(found, args, None)
    work = args.work_directory or Path(tempfile.mkdtemp(prefix="chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.jsonl"
    if not check_begun(file, args):
        return 2
    kept = results.Results(file)
    faults = plan.faults(args.faults, args.seed)
    began = time.monotonic()

    def say(text: str) -> None:
        done, now = len(kept.outcomes), time.monotonic() - began
        new = done - before
        left = f", about {now / new * (len(faults) - done) / 60:.0f} min left" if new > 5 else ""
        print(f"[{done} of {len(faults)} faults, {now / 60:.1f} min{left}] {text}", flush=True)

    before = len(kept.outcomes)
    material = Material(work)
    material.write()
    draw = random.Random(args.seed)
    campaign = Campaign(Surroundings(work, material, kept, args.layouts, draw), faults, say)
    try:
        campaign.run()
        if not kept.sweep:
            run = work / "runs" / "undisturbed"
            number = SHORT_SWEEP if args.faults < SHORT else None
            kept.swept(**sweep(run, work, number, args.seed))
    except (Failed, Hangs) as error:
        print(f"error: {error or 'nothing moves any more'}; see {work / 'logs'}", file=sys.stderr)
        return 2
    minutes = (time.monotonic() - began) / 60
    status = report(kept, args, minutes)
    if args.work_directory is None:
        if status:
            print(f"what was left is in {work}")
        else:
            shutil.rmtree(work)
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="which ones, and where (0)")
    parser.add_argument(
        "--layouts",
        type=int,
        nargs="+",
        default=LAYOUTS,
        choices=(1, 2, 4),
        help="numbers of processes to choose from, each as often as it is named",
    )
    parser.add_argument(
        "--work-directory", type=Path, help="for runs and results.jsonl; removed by default"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the campaign in --work-directory"
    )
    parser.add_argument(
        "--write", type=Path, help="a page whose table is replaced, if nothing is lost"
    )
    parser.add_argument("--table-from", type=Path, help="show this results.jsonl, inject nothing")
    return parser.parse_args()


def check_begun(file: Path, args: argparse.Namespace) -> bool:
    """Writes which campaign this is, or compares it with the one that is there."""
    mine = {"campaign": {"faults": args.faults, "seed": args.seed}}
    if not file.exists():
        file.write_text(json.dumps(mine) + "\n")
        return True
    with file.open() as lines:
        found = json.loads(lines.readline())
    if not args.resume:
        print(f"error: {file} is there already; --resume goes on with it", file=sys.stderr)
    elif found != mine:
        print(f"error: {file} is of {found['campaign']}, not of these", file=sys.stderr)
    return args.resume and found == mine


def report(kept: results.Results, args: argparse.Namespace, minutes: float | None) -> int:
    swept = kept.sweep
    head = (
        f"{len(kept.outcomes)} of {args.faults} faults (seed {args.seed}), in {len(kept.runs)} "
        f"runs of {STEPS} steps. They went on {kept.switches()} times in another number of "
        "processes."
    )
    if swept:
        head += (
            f" Besides, {swept['damages']} damages of single files of a step, one by one, each "
            f"restored: {swept['refused']} refused, {swept['no effect']} without effect, "
            f"{len(swept['wrong'])} accepted."
        )
    print(f"\n{head}\n\n{kept.table()}\n")
    status = kept.goals(args.faults)
    if minutes is not None:
        print(f"{minutes:.1f} minutes")
    if args.write is not None and not kept.wrong():
        results.write_table(args.write, f"{head}\n\n{kept.table()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
