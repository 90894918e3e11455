"""Counters, gauges and histograms, kept in one place so that several frontends show one truth.

The loop reports what happened and when; ``snapshot`` is what /metrics is made of. Names are those of LMDeploy
and vLLM without prefix.
"""

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass
from typing import get_args

from shoal.messages import Finished, FinishReason, Histogram, Rejected, RejectReason
from shoal.scheduler.admission import Speed
from shoal.scheduler.core import Collected, Core
from shoal.scheduler.plan import Step
from shoal.scheduler.request import Emitted, Ended, Pooled, Request

_WINDOW_STEPS = 64
_NS = 1e-9
_LATENCY_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
_INTERVAL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST_S = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_REFUSALS: tuple[RejectReason, ...] = get_args(RejectReason)
_NEWEST_SHARE = 0.1
"""Of the newest request in the mean of how long requests take."""


class Series:
    """A histogram that is being filled."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Counts one value; upper bounds are inclusive."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def frozen(self) -> Histogram:
        """As it travels."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class StepTime:
    """One finished step."""

    rows: int
    tokens: int
    busy_ns: int


class Statistics:
    """What has happened since the start of the process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._recent: deque[StepTime] = deque(maxlen=_WINDOW_STEPS)
        self._last_result_ns = 0
        self._request_s = 0.0
        self._series = {
            "time_to_first_token_seconds": Series(_LATENCY_S),
            "inter_token_latency_seconds": Series(_INTERVAL_S),
            "e2e_request_latency_seconds": Series(_REQUEST_S),
            "request_queue_time_seconds": Series(_REQUEST_S),
            "request_prefill_time_seconds": Series(_REQUEST_S),
            "request_decode_time_seconds": Series(_REQUEST_S),
            "request_inference_time_seconds": Series(_REQUEST_S),
            "request_prompt_tokens": Series(_TOKENS),
            "request_generation_tokens": Series(_TOKENS),
            "iteration_tokens_total": Series(_TOKENS),
        }

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed a second over the last steps, prompts included; 0 before the first step."""
        busy_ns = sum(step.busy_ns for step in self._recent)
        return sum(step.tokens for step in self._recent) / (busy_ns * _NS) if busy_ns else 0.0

    @property
    def speed(self) -> Speed:
        """What a time to come back is computed from."""
        return Speed(self.tokens_per_s, self._request_s)

    def rejected(self, rejected: Rejected) -> None:
        """A submit was refused."""
        self.count(_rejections(rejected.reason))

    def count(self, name: str, by: int = 1) -> None:
        """Raises a counter."""
        self._counts[name] += by

    def planned(self, step: Step, block_size: int, now_ns: int) -> None:
        """A step was decided."""
        self.count("num_preemptions_total", step.preempted)
        for request in step.admitted:
            self.count("prefix_cache_queries_total", request.known)
            self.count("prefix_cache_hits_total", request.hits * block_size)
            if not request.timing.seated_ns:
                request.timing.seated_ns = now_ns
                self._since("request_queue_time_seconds", request.timing.arrived_ns, now_ns)

    def stepped(self, collected: Collected, drafted: int, now_ns: int) -> None:
        """A result arrived, of a step that guessed ``drafted`` tokens; ``now_ns`` is on the clock of
        ``Flight.sent_ns``."""
        flight, tokens = collected.flight, collected.flight.tokens + collected.accepted
        busy_ns = now_ns - max(flight.sent_ns, self._last_result_ns)
        self._last_result_ns = now_ns
        self._recent.append(StepTime(flight.rows, tokens, busy_ns))
        self.count("steps_total")
        self.count("step_rows_total", flight.rows)
        self._series["iteration_tokens_total"].add(tokens)
        self.count("spec_decode_num_draft_tokens_total", drafted)
        self.count("spec_decode_num_accepted_tokens_total", collected.accepted)

    def emitted(self, emitted: Emitted, now_ns: int) -> None:
        """A token became known."""
        timing = emitted.request.timing
        if timing.first_token_ns:
            self._since("inter_token_latency_seconds", timing.last_token_ns, now_ns)
        else:
            timing.first_token_ns = now_ns
            self.count("prompt_tokens_total", emitted.request.prompt_len)
            self._count_tenant(emitted.request, "prompt", emitted.request.prompt_len)
            self._since("time_to_first_token_seconds", timing.arrived_ns, now_ns)
            self._since("request_prefill_time_seconds", timing.seated_ns, now_ns)
        timing.last_token_ns = now_ns
        self.count("generation_tokens_total")
        self._count_tenant(emitted.request, "generation", 1)

    def pooled(self, pooled: Pooled) -> None:
        """A prompt was computed for its vector: no token will tell of it."""
        self.count("prompt_tokens_total", pooled.request.prompt_len)

    def ended(self, ended: Ended, now_ns: int) -> None:
        """A request came to its end."""
        timing = ended.request.timing
        if ended.reason in ("stop", "length"):
            took_s = max(0, now_ns - timing.arrived_ns) * _NS
            self._request_s += (took_s - self._request_s) * (_NEWEST_SHARE if self._request_s else 1.0)
        self.count(f'request_success_total{{finished_reason="{ended.reason}"}}')
        self._since("e2e_request_latency_seconds", timing.arrived_ns, now_ns)
        if timing.seated_ns:
            self._since("request_inference_time_seconds", timing.seated_ns, now_ns)
        if timing.first_token_ns:
            self._since("request_decode_time_seconds", timing.first_token_ns, now_ns)
            self._series["request_prompt_tokens"].add(ended.request.prompt_len)
            self._series["request_generation_tokens"].add(ended.request.generated)

    def gauges(self, core: Core, asleep: int) -> dict[str, float]:
        """How things stand; ``asleep`` is the level of sleep."""
        pool = core.pool
        rows = [step.rows for step in self._recent]
        return {
            "num_http_requests": len(core.book.quotas),
            "num_requests_running": len(core.book.seated),
            "num_requests_waiting": len(core.book.waiting),
            "num_tokens_waiting": core.book.queued_tokens,
            "kv_cache_usage_perc": pool.held / pool.num_blocks if pool.num_blocks else 0.0,
            "kv_blocks_used": pool.held,
            "kv_blocks_total": pool.num_blocks,
            "kv_blocks_cached": len(pool.index),
            "mean_rows_per_step": sum(rows) / len(rows) if rows else 0.0,
            "tokens_per_second": self.tokens_per_s,
            "asleep": asleep,
        }

    def counters(self, core: Core, messages: dict[str, float]) -> dict[str, float]:
        """What only ever rises; ``messages`` are the sockets' own counts."""
        names = (
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "prompt_tokens_total",
            "generation_tokens_total",
            "num_preemptions_total",
            "requests_resumed_total",
            "steps_total",
            "step_rows_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        )
        labelled = [f'request_success_total{{finished_reason="{why}"}}' for why in _REASONS]
        zeros = dict.fromkeys([*names, *labelled, *map(_rejections, _REFUSALS)], 0.0)
        stale = {
            "stale_results_total": float(core.pipeline.stale_results),
            "stale_rows_total": float(core.stale_rows),
        }
        return zeros | dict(self._counts) | stale | messages

    def histograms(self) -> dict[str, Histogram]:
        """Distributions: of seconds, and of tokens."""
        return {name: series.frozen() for name, series in self._series.items()}

    def _count_tenant(self, request: Request, kind: str, tokens: int) -> None:
        if request.tenant:
            self.count(f'tenant_tokens_total{{tenant="{request.tenant}",kind="{kind}"}}', tokens)

    def _since(self, name: str, then_ns: int, now_ns: int) -> None:
        self._series[name].add(max(0, now_ns - then_ns) * _NS)


def finished(ended: Ended) -> Finished:
    """A request's end as its frontend is told."""
    request, timing = ended.request, ended.request.timing

    def microseconds(then_ns: int, until_ns: int) -> int:
        return max(0, until_ns - then_ns) // 1000 if then_ns and until_ns else 0

    return Finished(
        request_no=request.request_no,
        reason=ended.reason,
        stop_id=ended.stop_id,
        cached_tokens=max(0, request.cached_tokens),
        detail=ended.detail,
        fault=ended.fault,
        queue_us=microseconds(timing.arrived_ns, timing.seated_ns),
        prefill_us=microseconds(timing.seated_ns, timing.first_token_ns),
        decode_us=microseconds(timing.first_token_ns, timing.last_token_ns),
    )


def _rejections(reason: RejectReason) -> str:
    return f'request_rejected_total{{reason="{reason}"}}'


def milliseconds(request: Request, now_ns: int) -> dict[str, int]:
    """A request's times for its log line; -1 for what did not happen."""
    timing = request.timing

    def between(then_ns: int, until_ns: int) -> int:
        return (until_ns - then_ns) // 1_000_000 if then_ns and until_ns else -1

    return {
        "queue_ms": between(timing.arrived_ns, timing.seated_ns),
        "ttft_ms": between(timing.arrived_ns, timing.first_token_ns),
        "total_ms": between(timing.arrived_ns, now_ns),
    }
