"""What a request says of tools, checked: ``tools`` and ``tool_choice``, or ``functions`` and ``function_call``."""

import re
from typing import Final, Literal

from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.schemas.tools import FunctionDefinition, FunctionName, NamedTool, Tool, ToolChoice
from shoal.frontend.unavailable import refuse_unavailable
from shoal.frontend.values import invalid

Mode = Literal["none", "auto", "required", "named"]
_MOST_TOOLS: Final = 128
_NAME: Final = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_CHOICES: Final = ("none", "auto", "required")


class ToolWish(Struct, frozen=True, kw_only=True):
    """The tools of a request."""

    field: str
    """``tools`` or ``functions``: what errors name."""
    functions: tuple[FunctionDefinition, ...]
    """All that the model is told of; none where it must not call any."""
    allowed: frozenset[str]
    """Those that it may call."""
    mode: Mode
    parallel: bool
    """Whether an answer may have several calls."""

    @property
    def is_legacy(self) -> bool:
        """Whether the answer has ``function_call`` instead of ``tool_calls``."""
        return self.field == "functions"

    @property
    def is_forced(self) -> bool:
        """Whether the answer must have a call."""
        return self.mode in ("required", "named")

    @property
    def callable(self) -> list[FunctionDefinition]:
        """The functions that may be called."""
        return [function for function in self.functions if function.name in self.allowed]

    @property
    def is_held(self) -> bool:
        """Whether a grammar is needed: a call is forced, or the calls that may come are limited."""
        limited = not self.parallel or len(self.allowed) < len(self.functions)
        return self.is_forced or limited or any(function.strict for function in self.callable)


def tool_wish(request: ChatCompletionRequest) -> ToolWish | None:
    """What ``request`` wants of its tools; None where it has none. Raises RequestError."""
    if request.functions is not None or request.function_call is not None:
        return _legacy_wish(request)
    functions = [_function(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or [])]
    if not functions:
        if request.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools")
        return None
    _check_functions(request, functions, "tools")
    mode, allowed = _choice(request.tool_choice, frozenset(function.name for function in functions))
    return ToolWish(
        field="tools",
        functions=tuple(functions) if mode != "none" else (),
        allowed=allowed,
        mode=mode,
        parallel=request.parallel_tool_calls is not False and mode != "named",
    )


def _legacy_wish(request: ChatCompletionRequest) -> ToolWish | None:
    if request.tools or request.tool_choice is not None:
        raise invalid("functions", "are what tools replaced: give one of the two")
    functions, choice = request.functions or [], request.function_call
    if not functions:
        if choice not in (None, "none", "auto"):
            raise invalid("function_call", "needs functions")
        return None
    _check_functions(request, functions, "functions")
    names = frozenset(function.name for function in functions)
    mode: Mode = "auto"
    if isinstance(choice, FunctionName):
        mode, names = "named", _named(choice.name, names, "function_call.name")
    elif choice == "none":
        mode = "none"
    elif choice not in (None, "auto"):
        raise invalid("function_call", "must be none, auto, or an object with the name of a function")
    return ToolWish(
        field="functions",
        functions=tuple(functions) if mode != "none" else (),
        allowed=names,
        mode=mode,
        parallel=False,
    )


def _function(tool: Tool, where: str) -> FunctionDefinition:
    refuse_unavailable(tool, f"{where}.")
    if tool.type != "function":
        message = (
            f"{where}.type: the server has no tool {tool.type[:40]!r} of its own; only functions are taken"
        )
        raise RequestError(400, message, param=f"{where}.type", code="not_available")
    if tool.function is None:
        raise invalid(f"{where}.function", "is missing")
    return tool.function


def _check_functions(request: ChatCompletionRequest, functions: list[FunctionDefinition], field: str) -> None:
    if isinstance(request.messages, str) or request.do_preprocess is False:
        raise invalid(field, "need the chat template: send messages as a list, and no do_preprocess: false")
    if len(functions) > _MOST_TOOLS:
        raise invalid(field, f"has {len(functions)} of them; at most {_MOST_TOOLS} are taken")
    seen = set[str]()
    for number, function in enumerate(functions):
        where = f"{field}[{number}]" + (".function" if field == "tools" else "")
        if not _NAME.fullmatch(function.name):
            raise invalid(f"{where}.name", "must be 1 to 128 letters, digits or _ - . : /")
        if function.name in seen:
            raise invalid(f"{where}.name", f"{function.name} is there twice")
        seen.add(function.name)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise invalid(f"{where}.parameters", 'must be the schema of an object: {"type": "object", …}')


def _choice(choice: str | ToolChoice | None, names: frozenset[str]) -> tuple[Mode, frozenset[str]]:
    if choice is None:
        return "auto", names
    if isinstance(choice, str):
        for mode in ("none", "auto", "required"):
            if choice == mode:
                return mode, names
        raise invalid("tool_choice", f"must be {', '.join(_CHOICES)}, or an object that names a tool")
    if choice.type == "function" and choice.function is not None:
        return "named", _named(choice.function.name, names, "tool_choice.function.name")
    allowed = choice.allowed_tools
    if choice.type != "allowed_tools" or allowed is None:
        raise invalid(
            "tool_choice",
            'must be {"type": "function", "function": {"name": …}} or {"type": "allowed_tools", "allowed_tools": …}',
        )
    return _allowed_mode(allowed.mode), _allowed_names(allowed.tools, names)


def _allowed_mode(mode: str) -> Mode:
    if mode == "auto":
        return "auto"
    if mode == "required":
        return "required"
    raise invalid("tool_choice.allowed_tools.mode", "must be auto or required")


def _allowed_names(tools: list[NamedTool], names: frozenset[str]) -> frozenset[str]:
    where = "tool_choice.allowed_tools.tools"
    if not tools:
        raise invalid(where, "must not be empty; tool_choice none allows none")
    for number, tool in enumerate(tools):
        _named(tool.function.name, names, f"{where}[{number}].function.name")
    return frozenset(tool.function.name for tool in tools)


def _named(name: str, names: frozenset[str], where: str) -> frozenset[str]:
    if name not in names:
        raise invalid(where, f"{name[:80]!r} is none of the tools")
    return frozenset({name})


def as_template_has_it(function: FunctionDefinition) -> dict[str, object]:
    """A tool as templates and models are shown it, without what is not for the model."""
    shown: dict[str, object] = {"name": function.name}
    if function.description is not None:
        shown["description"] = function.description
    shown["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": shown}
