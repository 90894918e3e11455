"""The bodies and answers of /v1/chat/interactive and /v1/sessions."""

from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import RequestBody, Whole, doc
from shoal.frontend.schemas.chat import ChatMessage

_PROMPT = (
    "The next thing the user says, or a list of messages: a whole history, or what is to be appended to the session's. "
    "`messages` is another name for it; one of the two is needed, but to cancel."
)
_SAMPLING = "Unset: what the model's authors set in generation_config.json, else "


class GenerateRequest(RequestBody):
    """POST /v1/chat/interactive: one turn of a conversation that the server keeps."""

    prompt: Annotated[str | list[ChatMessage] | None, doc(_PROMPT, "Hello! How are you?")] = None
    messages: Annotated[
        str | list[ChatMessage] | None,
        doc("Another name for `prompt`.", [{"role": "user", "content": "Hello! How are you?"}]),
    ] = None
    session_id: Annotated[
        Whole | None,
        doc(
            "Which conversation: any number from 0. -1: the server picks one that is not taken; the answer names it. "
            "Each API key has sessions of its own.",
            1,
        ),
    ] = -1
    interactive_mode: Annotated[
        bool | None,
        doc(
            "true: the server keeps the conversation for the next turn. false: nothing is kept; a session that has a "
            "history is used once more and then ended.",
            True,
        ),
    ] = False
    stream: Annotated[
        bool | None,
        doc(
            "true: the answer comes in pieces, one JSON object a line, or as server-sent events where Accept names "
            "`text/event-stream`.",
            False,
        ),
    ] = False
    stop: Annotated[
        bool | str | list[str] | None,
        doc(
            "Texts that end the answer, up to 16, of any length; they are not part of it. true: the same as `cancel`.",
            ["\n\n"],
        ),
    ] = None
    cancel: Annotated[
        bool | None,
        doc(
            "true: ends the answer that runs in this session; what there is of it stays in the history.", False
        ),
    ] = False
    request_output_len: Annotated[
        Whole | None,
        doc(
            "Most tokens of the answer; null: as many as fit the session. 0, with an empty prompt and interactive_mode "
            "false, ends the session; with messages and interactive_mode true, keeps them unanswered.",
            512,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        doc(f"Only the likeliest tokens that make up this share are drawn, above 0 to 1. {_SAMPLING}0.8.", 0.8),
    ] = None
    top_k: Annotated[
        Whole | None, doc(f"Only so many of the likeliest tokens are drawn; 0: all. {_SAMPLING}40.", 40)
    ] = None
    temperature: Annotated[
        float | None, doc(f"0: always the likeliest token; up to 2. {_SAMPLING}0.8.", 0.8)
    ] = None
    repetition_penalty: Annotated[
        float | None,
        doc(f"Above 1: tokens that occurred are less likely, 0.01 to 10. {_SAMPLING}1.", 1.0),
    ] = None
    min_p: Annotated[
        float | None,
        doc(
            f"Tokens below this share of the likeliest one's probability are not drawn, 0 to 1. {_SAMPLING}0.",
            0.0,
        ),
    ] = None
    seed: Annotated[
        Whole | None, doc("The same request with the same seed gets the same answer; unset: a random one.", 0)
    ] = None
    min_new_tokens: Annotated[
        Whole | None, doc("The answer does not end by itself before it has so many tokens; unset: 0.", 0)
    ] = None
    ignore_eos: Annotated[
        bool | None, doc("true: the answer goes on past the model's end of sequence.", False)
    ] = False
    skip_special_tokens: Annotated[
        bool | None, doc("false: the model's special tokens show in the text.", True)
    ] = True
    spaces_between_special_tokens: Annotated[
        bool | None, doc("Whether special tokens that show are set apart by spaces.", True)
    ] = True
    adapter_name: Annotated[str | None, doc("A LoRA adapter, by its name.", None)] = None
    image_url: Annotated[
        str | list[str] | None, doc("For models that see; the others refuse it with a 400.", None)
    ] = None
    model: Annotated[
        str | None, doc("Checked where it is given; unset: the served one.", "SmolLM2-135M-Instruct")
    ] = None
    timeout: Annotated[
        float | None,
        doc("Seconds after which the request ends in a 408, its wait in the queue included.", 60.0),
    ] = None
    user: Annotated[str | None, doc("Whom the request is for: a word in the log.", "user-1234")] = None
    kwargs: Annotated[
        Any, doc("LMDeploy's client sends an empty object; nothing else is taken.", neutral=({},))
    ] = None


class GenerateResponse(Struct, kw_only=True):
    """The answer to a turn, or one line of its stream."""

    text: Annotated[str, doc("The answer; in a stream what was added to it.", "I am fine, thank you!")]
    tokens: Annotated[int, doc("Tokens generated for this answer so far, the one that ended it included.", 7)]
    input_tokens: Annotated[
        int,
        doc("Tokens that this turn put behind the history: its messages and what the chat template adds.", 15),
    ]
    history_tokens: Annotated[
        int, doc("Tokens of the conversation before this turn, as the model saw it last.", 120)
    ]
    finish_reason: Annotated[
        str | None,
        doc(
            "`stop`: the model ended it, or a stop text; `length`: `request_output_len`, or, with no text and the "
            "header X-Session-State: full, the session's length; `cancelled`: by a call with `cancel`; null in a "
            "stream before its last line.",
            "stop",
        ),
    ] = None
    session_id: Annotated[int, doc("The session to name in the next turn.", 1)]
    cached_tokens: Annotated[
        int | UnsetType,
        doc("Of history and input, the tokens that were not computed again; known at the end.", 112),
    ] = UNSET
    reasoning_content: Annotated[
        str | UnsetType,
        doc("What the model thought before it answered, where it does; in a stream what was added to it.", ""),
    ] = UNSET
    detail: Annotated[
        str | UnsetType, doc("What there is to say of an unusual end.", "session 1 is full: …")
    ] = UNSET


class SessionObject(Struct, kw_only=True):
    """A conversation that the server keeps."""

    id: Annotated[int, doc("Its `session_id`.", 1)]
    object: Annotated[str, doc("Always session.", "session")] = "session"
    created_at: Annotated[int, doc("When its first turn ended, Unix time in seconds.", 1700000000)]
    updated_at: Annotated[int, doc("When its last turn ended, Unix time in seconds.", 1700000100)]
    expires_at: Annotated[
        int | None, doc("When it is forgotten unless it is used; null: never.", 1700086400)
    ] = None
    state: Annotated[str, doc("`running` while a turn is being answered, else `idle`.", "idle")]
    turns: Annotated[int, doc("Turns that it has had.", 3)]
    message_count: Annotated[int, doc("Messages in it.", 6)]
    tokens: Annotated[int, doc("Length of the conversation as the model saw it last.", 214)]
    generated_tokens: Annotated[int, doc("Of all answers.", 96)]
    max_tokens: Annotated[
        int | None, doc("Length at which it is full: --session_len; null while the model loads.", 8192)
    ] = None


class SessionMessage(Struct, kw_only=True):
    """A message of a session."""

    role: Annotated[str, doc("`system`, `user`, `assistant` or `tool`.", "user")]
    content: Annotated[Any, doc("Its text, or parts, as they were sent.", "Hello! How are you?")] = None
    reasoning_content: Annotated[str | UnsetType, doc("Of an answer: what was thought before.", "")] = UNSET
    tool_calls: Annotated[list[Any] | UnsetType, doc("As they were sent.", [])] = UNSET
    tool_call_id: Annotated[str | UnsetType, doc("As it was sent.", "call_1")] = UNSET
    name: Annotated[str | UnsetType, doc("As it was sent.", "Ann")] = UNSET
    created_at: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    tokens: Annotated[int | UnsetType, doc("Of an answer: its tokens.", 32)] = UNSET
    finish_reason: Annotated[str | UnsetType, doc("Of an answer: why it ended.", "stop")] = UNSET
    mark: Annotated[
        str | UnsetType,
        doc("`cancelled` or `disconnected`: the answer is what there was of it by then.", "cancelled"),
    ] = UNSET


class SessionDetail(SessionObject, kw_only=True):
    """A session with all that was said."""

    messages: Annotated[list[SessionMessage], doc("In order.")]


class SessionList(Struct, kw_only=True):
    """A page of sessions."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    data: Annotated[list[SessionObject], doc("The sessions.")]
    first_id: Annotated[int | None, doc("The first one's id.", 1)] = None
    last_id: Annotated[int | None, doc("The last one's id: send it as `after` for the next page.", 9)] = None
    has_more: Annotated[bool, doc("Whether there is a next page.", False)] = False


class SessionExport(Struct, kw_only=True):
    """A session as a file: its messages can be sent as they are, here or to any OpenAI-like server."""

    object: Annotated[str, doc("Always session.export.", "session.export")] = "session.export"
    version: Annotated[int, doc("Of this form.", 1)] = 1
    session_id: Annotated[int, doc("Which session it was.", 1)]
    model: Annotated[str, doc("The model that answers now.", "SmolLM2-135M-Instruct")]
    created_at: Annotated[int, doc("When its first turn ended, Unix time in seconds.", 1700000000)]
    updated_at: Annotated[int, doc("When its last turn ended, Unix time in seconds.", 1700000100)]
    messages: Annotated[
        list[dict[str, Any]],
        doc("As a request's `messages`.", [{"role": "user", "content": "Hello! How are you?"}]),
    ]


class SessionDeleted(Struct, kw_only=True):
    """Answer of DELETE /v1/sessions/{session_id}."""

    id: Annotated[int, doc("Which session.", 1)]
    object: Annotated[str, doc("Always session.", "session")] = "session"
    deleted: Annotated[bool, doc("Always true.", True)] = True


class SessionsDeleted(Struct, kw_only=True):
    """Answer of DELETE /v1/sessions."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    deleted: Annotated[int, doc("Sessions that are gone.", 12)]
    running: Annotated[int, doc("Sessions that stay because a turn is being answered.", 0)]
