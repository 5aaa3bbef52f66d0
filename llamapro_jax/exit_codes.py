"""What the processes of a run exit with, and what a launcher does about it.

A launcher starts the same command again after PREEMPTED and STALLED, and after a death by a
signal; after any other status it would only meet the same end. `docs/reliability.md` has the table.
"""

from __future__ import annotations

import signal

DONE = 0
# A check failed, or an error that nobody foresaw, with its traceback.
FAILED = 1
# Bad input, what the system refuses, and numbers that went wrong: somebody has to look.
REFUSED = 2
# SIGTERM: what was done is saved.
PREEMPTED = 42
# The watchdog: nothing moved for too long.
STALLED = 43
# Every checkpoint of the run is damaged.
CHECKPOINT_LOST = 44
# Another run has the run directory now, and goes on.
TAKEN_OVER = 45
# SIGINT, as shells have it. In a training run what was done is saved.
INTERRUPTED = 130
# SIGTERM in any other verb.
TERMINATED = 143


def status_of(error: BaseException) -> int:
    """What a process exits with when `error` ends it.

    An exception with a number of its own carries it as `status`, as `training.stopping.Stopped`
    does, and SystemExit as `code`.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError):
        return REFUSED
    status = getattr(error, "status", getattr(error, "code", FAILED))
    return status if isinstance(status, int) else FAILED


def worth_restarting(status: int) -> bool:
    """Whether the same command, started again, would go on instead of meeting the same end.

    status: as `subprocess` has it (-N for a death by signal N) or as a shell has it (128 + N).
    SIGINT came from somebody who wanted the run to end.
    """
    number = -status if status < 0 else status - 128
    killed = 0 < number < signal.NSIG and number != signal.SIGINT
    return killed or status in (PREEMPTED, STALLED)
