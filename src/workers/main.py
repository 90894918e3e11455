"""``python -m shoal.workers.main SETTINGS.json RANK``: one tensor-parallel rank."""

import os
import sys
from pathlib import Path

from shoal import config, logs, process
from shoal.cuda_ext import ops
from shoal.cuda_ext.cuda_binding import CudaError
from shoal.errors import StartError
from shoal.workers.loop import RankLoop


def main() -> int:
    """Runs the rank until it is told to stop; returns the exit code."""
    process.die_with_supervisor()
    settings = config.load(Path(sys.argv[1]))
    rank = int(sys.argv[2])
    logs.configure(f"rank{rank}", settings.log_level)
    threads = max(1, settings.threads // settings.tp)
    cpus = _own_cpus(rank, threads, settings.tp)
    ops.set_threads(threads, cpus)
    try:
        loop = RankLoop(settings, rank)
        if cpus and (loop.is_on_host or settings.tp > 1):
            # Of operators on the host the first processor, which the helpers leave: on one of theirs two of the rank's
            # threads would take turns, while they wait for each other. Threads that run already keep theirs.
            os.sched_setaffinity(0, cpus[:1] if loop.is_on_host else cpus)
        loop.run()
    except StartError as error:
        sys.stderr.write(f"error: {error}\n")
        return process.START_FAILED_EXIT
    except CudaError as error:
        sys.stderr.write(f"error: GPU {rank} failed: {error}\n")
        return 1
    return 0


def _own_cpus(rank: int, threads: int, tp: int) -> list[int]:
    """One processor a thread; none where there are not as many as all ranks' threads."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[rank * threads : (rank + 1) * threads] if tp * threads <= len(cpus) else []


if __name__ == "__main__":
    sys.exit(main())
