"""A model's thinking: how much of it a request wants, where it begins and ends, and splitting it from the answer."""

from typing import Any, Final, Literal

from msgspec import Struct

from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.values import invalid, not_available, whole

WHITE: Final = " \t\n\r"
EFFORTS: Final = {"none": 0, "minimal": 512, "low": 1024, "medium": 4096, "high": None, "xhigh": None}
"""Most tokens of thinking; None: any number."""
_MOST_BUDGET: Final = 1 << 31
State = Literal["before", "within", "after"]


class Markers(Struct, frozen=True):
    """What stands around a model's thinking."""

    opening: str
    closing: str


THINK: Final = Markers("<think>", "</think>")
_KNOWN: Final = (THINK, Markers("[THINK]", "[/THINK]"))


def find_markers(wanted: str, template: ChatTemplate) -> Markers | None:
    """The markers for ``wanted`` (a value of ``--reasoning_parser``): those that the template writes or looks for, if
    it is auto. None: the model does not think, or nobody wants it told apart."""
    if wanted == "none":
        return None
    found = (markers for markers in _KNOWN if markers.closing in template.source)
    return next(found, None if wanted == "auto" else THINK)


def most_thinking(request: ChatCompletionRequest, markers: Markers | None) -> int | None:
    """The most tokens of thinking that ``request`` allows; None: any number. Raises RequestError."""
    budget = None
    if request.thinking_token_budget is not None:
        budget = whole("thinking_token_budget", request.thinking_token_budget, 0, 0, _MOST_BUDGET)
        if markers is None:
            raise not_available("thinking_token_budget", "this model does not think; leave it out")
    effort = request.reasoning_effort
    if effort is None:
        return budget
    if effort not in EFFORTS:
        raise invalid("reasoning_effort", f"must be one of {', '.join(EFFORTS)}, not {effort[:40]!r}")
    if effort == "none" and request.enable_thinking:
        raise invalid("enable_thinking", "true contradicts reasoning_effort: none; give one of them")
    limits = [limit for limit in (budget, EFFORTS[effort]) if limit is not None]
    return min(limits, default=None)


def thinking_variables(template: ChatTemplate, request: ChatCompletionRequest) -> dict[str, Any]:
    """What the template is told of the wish, in the words that it knows."""
    effort = request.reasoning_effort
    told: dict[str, Any] = {}
    if effort is not None and template.reads("reasoning_effort"):
        told["reasoning_effort"] = effort
    none = effort == "none" or request.thinking_token_budget == 0
    if none and template.reads("enable_thinking"):
        told["enable_thinking"] = False
    return told


def state_after(markers: Markers, prompt: str) -> State:
    """Where the thinking stands at the end of a prompt."""
    end = prompt.rstrip(WHITE)
    if end.endswith(markers.opening):
        return "within"
    return "after" if end.endswith(markers.closing) else "before"


def state_in(markers: Markers, said: str) -> State:
    """Where the thinking stands at the end of an answer that has begun."""
    opened, closed = said.rfind(markers.opening), said.rfind(markers.closing)
    if opened > closed:
        return "within"
    return "after" if said.strip(WHITE) else "before"


def steering(markers: Markers, state: State, most: int | None) -> tuple[str, State]:
    """What to put behind a prompt so that thinking can be limited, and the state then: a limit counts from the first
    token, so the thinking must have begun; of none it must be over."""
    if most is None or state == "after":
        return "", state
    opened = f"{markers.opening}\n" if state == "before" else ""
    return (opened, "within") if most else (f"{opened}\n{markers.closing}\n\n", "after")


class ThoughtSplitter:
    """Splits a growing answer into thinking and the rest, without the markers and the white space around them."""

    def __init__(self, markers: Markers, state: State) -> None:
        self.state = state
        self.opened = state == "within"
        """Whether there was any thinking, if only its markers."""
        self._markers = markers
        self._held = ""
        self._trims = state == "within"
        """White space at the beginning of the present part is dropped."""

    def feed(self, text: str) -> tuple[str, str]:
        """What became certain of the thinking, and of the rest."""
        thought = ""
        if self.state == "before":
            text = self._before(text)
        if self.state == "within":
            thought, text = self._within(text)
        if self.state == "after":
            return thought, self._after(text)
        return thought, ""

    def finish(self) -> tuple[str, str]:
        """What was held back: the answer has ended."""
        held, self._held = self._held, ""
        return (held.rstrip(WHITE), "") if self.state == "within" else ("", held)

    def _before(self, text: str) -> str:
        """Looks for the opening, with which an answer must begin; returns what stands behind it, or all of it."""
        self._held += text
        begun = self._held.lstrip(WHITE)
        if self._markers.opening.startswith(begun[: len(self._markers.opening)]):
            if len(begun) < len(self._markers.opening):
                return ""
            self.state, self.opened, self._trims = "within", True, True
            begun = begun[len(self._markers.opening) :]
        else:
            self.state = "after"
            begun = self._held
        self._held = ""
        return begun

    def _within(self, text: str) -> tuple[str, str]:
        """The thinking, and what stands behind its end."""
        known = self._held + text
        if self._trims:
            known = known.lstrip(WHITE)
        closing = self._markers.closing
        place = known.find(closing)
        if place >= 0:
            self.state, self._trims, self._held = "after", True, ""
            return known[:place].rstrip(WHITE), known[place + len(closing) :]
        longest = min(len(closing) - 1, len(known))
        held = next((n for n in range(longest, 0, -1) if closing.startswith(known[-n:])), 0)
        certain = known[: len(known) - held].rstrip(WHITE)
        self._held = known[len(certain) :]
        self._trims = self._trims and not certain
        return certain, ""

    def _after(self, text: str) -> str:
        if self._trims:
            text = text.lstrip(WHITE)
            self._trims = not text
        return text
