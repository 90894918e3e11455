"""``python -m shoal.scheduler.main SETTINGS.json``: the scheduler process.

The first SIGTERM drains, a second one ends at once. SIGINT is left to the supervisor: a Ctrl-C reaches the whole
terminal group, and the supervisor then drains everything in order.
"""

import logging
import os
import secrets
import signal
import sys
from pathlib import Path
from types import FrameType

from shoal import config, logs, process
from shoal.config import ApiKey, Settings
from shoal.scheduler.core import Core, Rules
from shoal.scheduler.crew import Crew
from shoal.scheduler.gateway import Gateway
from shoal.scheduler.link import Watch
from shoal.scheduler.loop import Loop
from shoal.scheduler.quota import Quota
from shoal.wire import new_boot_id

_LOG = logging.getLogger("shoal.scheduler")
_PREFIX_KEY_BYTES = 32
_FORCED_EXIT = 128 + signal.SIGTERM


def main() -> int:
    """Serves until drained; returns the exit code."""
    process.die_with_supervisor()
    settings = config.load(Path(sys.argv[1]))
    logs.configure("scheduler", settings.log_level)
    watch, boot_id = Watch(), new_boot_id()
    gateway = Gateway(watch, settings.run_dir, boot_id)
    crew = Crew(watch, settings.run_dir, boot_id, settings.tp)
    loop = Loop(settings, Core(rules_of(settings)), gateway, crew, watch)
    _listen_to_signals(loop, watch)
    logs.event(_LOG, "scheduler_started", boot_id=boot_id, ranks=settings.tp, slots=settings.instance_num)
    loop.run()
    watch.close([gateway.socket, crew.socket])
    logs.event(_LOG, "scheduler_stopped")
    return 0


def rules_of(settings: Settings) -> Rules:
    """What the core needs of the settings, and a fresh secret for the prefix index."""
    return Rules(
        instance_num=settings.instance_num,
        session_len=settings.session_len,
        block_size=settings.cache_block_seq_len,
        token_budget=settings.max_prefill_token_num,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        prefix_caching=settings.enable_prefix_caching,
        prefix_key=secrets.token_bytes(_PREFIX_KEY_BYTES),
        quotas={key.name: _quota_of(key) for key in settings.api_keys},
        max_concurrent_requests=settings.max_concurrent_requests,
    )


def _quota_of(key: ApiKey) -> Quota:
    return Quota(key.max_concurrent, key.requests_per_minute, key.tokens_per_minute, key.priority)


def _listen_to_signals(loop: Loop, watch: Watch) -> None:
    asked = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(_FORCED_EXIT)
        asked = True
        loop.ask_to_drain()

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch.wake_on_signals()


if __name__ == "__main__":
    sys.exit(main())
