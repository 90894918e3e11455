"""What a tenant may have: HTTP requests at once, HTTP requests a minute, tokens a minute; and how many everybody
together may have open. Pure: time is an argument.

Counted here and not in the frontends, so that several of them do not multiply a limit. An HTTP request is all
sequences of one frontend with one group; it is held against the limits once, by its first sequence, and taken in
whole. Owned by core; admission asks, the book tells who comes and goes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.messages import Rejected, RejectReason, Submit
from shoal.scheduler.request import Group, Request

_MINUTE_NS = 60_000_000_000
_RETRY_MS_UNKNOWN = 1000
_RETRY_MS_LEAST = 100
_RETRY_MS_MOST = 60_000


@dataclass(frozen=True, slots=True)
class Quota:
    """One tenant's limits; 0 is none."""

    max_concurrent: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    priority: int | None = None
    """The most urgent priority (the lowest number) that may be asked for."""


class Bucket:
    """Fills at ``per_minute``, up to a minute's worth, and is full at first; what is taken may go below zero."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._filled_ns = 0

    def take(self, amount: int) -> None:
        """Takes, whether it is there or not."""
        self._level -= amount

    def wait_ms(self, amount: int, now_ns: int) -> int:
        """When ``amount`` will be there; 0 is now. More than fits counts as all that fits."""
        self._fill(now_ns)
        missing = min(amount, self._per_minute) - self._level
        return -int(-missing * _MINUTE_NS / self._per_minute // 1_000_000) if missing > 0 else 0

    def _fill(self, now_ns: int) -> None:
        passed_ns = max(0, now_ns - self._filled_ns)
        self._filled_ns = max(now_ns, self._filled_ns)
        self._level = min(self._level + passed_ns * self._per_minute / _MINUTE_NS, self._per_minute)


class Account:
    """What one tenant with limits has taken."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.requests = Bucket(quota.requests_per_minute) if quota.requests_per_minute else None
        self.tokens = Bucket(quota.tokens_per_minute) if quota.tokens_per_minute else None
        self.open = 0


@dataclass(slots=True)
class Sequences:
    """One open HTTP request."""

    count: int = 0
    last_prompt: bytes = b""
    """n choices of one prompt come one after the other: it is paid for once."""


class Quotas:
    """Every tenant's account."""

    def __init__(self, by_tenant: Mapping[str, Quota], most_open: int = 0) -> None:
        self._accounts = {tenant: Account(quota) for tenant, quota in by_tenant.items()}
        self._most_open = most_open
        self._open: dict[Group, Sequences] = {}
        self._refused: dict[int, tuple[int, Rejected]] = {}
        """frontend → its last HTTP request that was refused: its other sequences are refused alike."""

    def __len__(self) -> int:
        return len(self._open)

    def check(self, frontend_no: int, submit: Submit, now_ns: int, request_s: float) -> Rejected | None:
        """Why the submit is refused, if it is. ``request_s``: how long requests take, 0 where that is not known."""
        group = group_of(frontend_no, submit)
        if group in self._open:
            return None
        known, refused = self._refused.get(frontend_no, (0, None))
        if refused is None or known != group[1]:
            refused = self._refusal(submit, now_ns, request_s)
            if refused is None:
                return None
            self._refused[frontend_no] = group[1], refused
        return Rejected(submit.request_no, 429, refused.detail, refused.retry_ms, refused.reason)

    def charge(self, frontend_no: int, submit: Submit) -> None:
        """An accepted submit is paid for; the first sequence of an HTTP request pays for that too."""
        account = self._accounts.get(submit.tenant)
        if account is None:
            return
        sequences = self._open.get(group_of(frontend_no, submit))
        if account.requests and sequences is None:
            account.requests.take(1)
        if account.tokens and (sequences is None or sequences.last_prompt != submit.prompt):
            account.tokens.take(len(submit.prompt) // 4)

    def spend(self, tenant: str, tokens: int) -> None:
        """Tokens were generated."""
        account = self._accounts.get(tenant)
        if account and account.tokens:
            account.tokens.take(tokens)

    def enter(self, request: Request) -> None:
        """A sequence is open."""
        sequences = self._open.get(request.group)
        if sequences is None:
            sequences = self._open[request.group] = Sequences()
            self._count(request.tenant, 1)
        sequences.count += 1
        sequences.last_prompt = request.prompt

    def leave(self, request: Request) -> None:
        """A sequence has ended."""
        sequences = self._open[request.group]
        sequences.count -= 1
        if not sequences.count:
            del self._open[request.group]
            self._count(request.tenant, -1)

    def forget(self, frontend_no: int) -> None:
        """A frontend has gone."""
        self._refused.pop(frontend_no, None)

    def most_urgent(self, tenant: str) -> int | None:
        """The lowest priority that the tenant may ask for."""
        account = self._accounts.get(tenant)
        return account.quota.priority if account else None

    def discrepancy(self, requests: list[Request]) -> str:
        """What is wrong with the counts, given all open requests; empty where they add up."""
        counted = Counter(request.group for request in requests)
        if counted != {group: sequences.count for group, sequences in self._open.items()}:
            return f"{len(self._open)} HTTP requests are counted as open, {len(counted)} are"
        tenants = Counter({request.group: request.tenant for request in requests}.values())
        wrong = [name for name, account in self._accounts.items() if account.open != tenants[name]]
        return f"the open HTTP requests of {wrong[:8]} are counted wrong" if wrong else ""

    def _refusal(self, submit: Submit, now_ns: int, request_s: float) -> Rejected | None:
        if self._most_open and len(self._open) >= self._most_open:
            what = f"{len(self._open)} requests are open, the most is {self._most_open}"
            return _refused(what, "concurrency", _turnover_ms(request_s, len(self._open)))
        account = self._accounts.get(submit.tenant)
        if account is None:
            return None
        quota, name = account.quota, submit.tenant
        if quota.max_concurrent and account.open >= quota.max_concurrent:
            what = f"{name} has {account.open} requests open, the most is {quota.max_concurrent}"
            return _refused(what, "concurrency", _turnover_ms(request_s, account.open))
        if account.requests and (wait_ms := account.requests.wait_ms(1, now_ns)):
            return _refused(
                f"{name} may send {quota.requests_per_minute} requests a minute", "request_rate", wait_ms
            )
        if account.tokens and (wait_ms := account.tokens.wait_ms(len(submit.prompt) // 4, now_ns)):
            return _refused(f"{name} may use {quota.tokens_per_minute} tokens a minute", "token_rate", wait_ms)
        return None

    def _count(self, tenant: str, by: int) -> None:
        if account := self._accounts.get(tenant):
            account.open += by


def group_of(frontend_no: int, submit: Submit) -> Group:
    """The HTTP request that a submit is part of."""
    return frontend_no, submit.group or submit.request_no


def _turnover_ms(request_s: float, open_requests: int) -> int:
    """When one of the open requests is expected to end."""
    expected_ms = int(1000 * request_s / open_requests) if request_s > 0 else _RETRY_MS_UNKNOWN
    return max(_RETRY_MS_LEAST, min(expected_ms, _RETRY_MS_MOST))


def _refused(what: str, reason: RejectReason, retry_ms: int) -> Rejected:
    return Rejected(0, 429, f"{what}; try again later", retry_ms, reason)
