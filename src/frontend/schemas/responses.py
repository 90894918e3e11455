"""The body of POST /v1/responses, the response object and the events of its stream: OpenAI's Responses API."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import RequestBody, Whole, doc

_RESPONSE_ID = "resp_0123456789abcdef"
_HINT = "A hint that changes no token; returned as given."


class ResponsePart(RequestBody):
    """A part of an item's content. Only text is read."""

    type: Annotated[
        Literal[
            "input_text",
            "output_text",
            "text",
            "refusal",
            "reasoning_text",
            "summary_text",
            "input_image",
            "input_file",
            "input_audio",
        ],
        doc("`input_text` or `output_text`.", "input_text"),
    ]
    text: Annotated[str | None, doc("The text.", "Hello!")] = None
    refusal: Annotated[str | None, doc("The text of a refusal.", None)] = None
    annotations: Annotated[Any, doc("Of an earlier answer; not read.", [])] = None
    logprobs: Annotated[Any, doc("Of an earlier answer; not read.", [])] = None
    image_url: Annotated[Any, doc("Refused: no model that reads images is served.", None)] = None
    file_id: Annotated[Any, doc("Refused.", None)] = None
    file_data: Annotated[Any, doc("Refused.", None)] = None
    file_url: Annotated[Any, doc("Refused.", None)] = None
    filename: Annotated[Any, doc("Refused.", None)] = None
    input_audio: Annotated[Any, doc("Refused.", None)] = None
    detail: Annotated[Any, doc("Of an image.", None)] = None


class ResponseItem(RequestBody):
    """An item of the input: a message, a function call, its output, or reasoning."""

    type: Annotated[
        str | None,
        doc(
            "`message` (also where it is left out), `function_call`, `function_call_output` or `reasoning`.",
            "message",
        ),
    ] = None
    id: Annotated[str | None, doc("Of an earlier answer's item.", "msg_0123456789abcdef")] = None
    status: Annotated[str | None, doc("Of an earlier answer's item; not read.", "completed")] = None
    role: Annotated[str | None, doc("Of a message: user, assistant, system or developer.", "user")] = None
    content: Annotated[str | list[ResponsePart] | None, doc("Of a message or of reasoning.", "Hello!")] = None
    phase: Annotated[str | None, doc("Of an earlier answer's message; not read.", None)] = None
    call_id: Annotated[str | None, doc("Of a call and of its output.", "call_0123456789abcdef")] = None
    name: Annotated[str | None, doc("The function of a call.", "get_weather")] = None
    namespace: Annotated[Any, doc("Not available.", None, neutral=("",))] = None
    arguments: Annotated[str | None, doc("Of a call: JSON text.", '{"city": "Paris"}')] = None
    output: Annotated[str | list[ResponsePart] | None, doc("What a call gave back.", "18 °C")] = None
    summary: Annotated[list[ResponsePart] | None, doc("Of reasoning.", [])] = None
    encrypted_content: Annotated[str | None, doc("Of reasoning, as it was answered.", None)] = None
    caller: Annotated[Any, doc("A hint.", None)] = None


class ResponseTool(RequestBody):
    """A function that the model may call."""

    type: Annotated[str, doc("Only `function`: the server has no tools of its own.", "function")]
    name: Annotated[str | None, doc("Its name.", "get_weather")] = None
    description: Annotated[str | None, doc("What it does.", "The weather in a city.")] = None
    parameters: Annotated[
        dict[str, Any] | None,
        doc("JSON Schema of its arguments.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    ] = None
    strict: Annotated[bool | None, doc("Whether the arguments must match the schema.", True)] = None
    defer_loading: Annotated[Any, doc("Not available.", None, neutral=(False,))] = None
    allowed_callers: Annotated[Any, doc("Not available.", None, neutral=(["direct"], []))] = None
    output_schema: Annotated[Any, doc("A hint.", None)] = None


class TextFormat(RequestBody):
    """What the answer must look like."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"], doc("`text`, `json_object` or `json_schema`.", "text")
    ]
    name: Annotated[str | None, doc("Of the schema.", "person")] = None
    schema: Annotated[dict[str, Any] | None, doc("The JSON Schema.", {"type": "object"})] = None
    description: Annotated[str | None, doc("What it is for.", "A person.")] = None
    strict: Annotated[bool | None, doc("The answer always matches.", True)] = None


class TextConfig(RequestBody):
    """How the text of the answer is to be."""

    format: Annotated[TextFormat | None, doc("What it must look like.")] = None
    verbosity: Annotated[Any, doc("Only `medium`.", "medium", neutral=("medium",))] = None


class ReasoningConfig(RequestBody):
    """How the model thinks."""

    effort: Annotated[str | None, doc("As `reasoning_effort` of /v1/chat/completions.", None)] = None
    summary: Annotated[Any, doc("Only `auto`: reasoning is answered as it is.", None, neutral=("auto",))] = None
    generate_summary: Annotated[Any, doc("Only `auto`.", None, neutral=("auto",))] = None
    context: Annotated[Any, doc("Only `auto`.", None, neutral=("auto", "all_turns"))] = None
    mode: Annotated[Any, doc("Only `standard`.", None, neutral=("standard",))] = None


class ResponseStreamOptions(RequestBody):
    """How the stream is to be."""

    include_obfuscation: Annotated[Any, doc("Only false.", False, neutral=(False,))] = None


class InputTokensRequest(RequestBody):
    """POST /v1/responses/input_tokens; also the part of POST /v1/responses that becomes the prompt."""

    model: Annotated[str | None, doc("The served model's name.", "SmolLM2-135M-Instruct")] = None
    input: Annotated[
        str | list[ResponseItem] | None, doc("The user's text, or items.", "Hello! How are you?")
    ] = None
    instructions: Annotated[
        str | None, doc("The system prompt of this turn; not carried over to the next.", "Answer briefly.")
    ] = None
    previous_response_id: Annotated[str | None, doc("Goes on after this response.", _RESPONSE_ID)] = None
    tools: Annotated[list[ResponseTool] | None, doc("What the model may call.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, doc("auto, none, required, or a function's type and name.", "auto")
    ] = None
    parallel_tool_calls: Annotated[bool | None, doc("False: at most one call an answer.", True)] = None
    reasoning: Annotated[ReasoningConfig | None, doc("How it thinks.")] = None
    text: Annotated[TextConfig | None, doc("How the text is to be.")] = None
    truncation: Annotated[Any, doc("Only `disabled`: too much is refused.", None, neutral=("disabled",))] = None
    conversation: Annotated[Any, doc("Not available: use previous_response_id.", None, neutral=())] = None


class ResponsesRequest(InputTokensRequest):
    """POST /v1/responses."""

    stream: Annotated[bool | None, doc("Answer as server-sent events.", False)] = None
    stream_options: Annotated[ResponseStreamOptions | None, doc("How the stream is to be.")] = None
    background: Annotated[
        bool | None, doc("Answer at once, work on it afterwards; ask GET for the result.", False)
    ] = None
    store: Annotated[bool | None, doc("Keep it for 30 days, to be read and continued. Default true.", True)] = (
        None
    )
    metadata: Annotated[dict[str, str] | None, doc("Up to 16 pairs, returned as given.", {"topic": "demo"})] = (
        None
    )
    max_output_tokens: Annotated[Whole | None, doc("Most tokens of the answer; default: what fits.", 256)] = (
        None
    )
    max_tool_calls: Annotated[Whole | None, doc("Most calls of tools of the server, which has none.", 1)] = None
    temperature: Annotated[float | None, doc("0 is greedy; default: the model's, else 1.", 0.7)] = None
    top_p: Annotated[float | None, doc("Nucleus sampling, above 0 and up to 1.", 0.9)] = None
    top_logprobs: Annotated[Whole | None, doc("Candidates at each position, up to 20.", 0)] = None
    include: Annotated[
        list[str] | None,
        doc("`message.output_text.logprobs`, `reasoning.encrypted_content`.", ["message.output_text.logprobs"]),
    ] = None
    user: Annotated[str | None, doc("Who asks; recorded in the log.", "user-1")] = None
    safety_identifier: Annotated[str | None, doc(_HINT, "user-1")] = None
    prompt_cache_key: Annotated[str | None, doc(_HINT, "demo")] = None
    prompt_cache_retention: Annotated[str | None, doc(_HINT, "in_memory")] = None
    prompt_cache_options: Annotated[Any, doc(_HINT, None)] = None
    service_tier: Annotated[Any, doc("Only `auto` or `default`.", "auto", neutral=("auto", "default"))] = None
    prompt: Annotated[Any, doc("Not available: stored prompts.", None, neutral=())] = None
    context_management: Annotated[Any, doc("Not available.", None, neutral=([],))] = None
    moderation: Annotated[Any, doc("Not available.", None, neutral=())] = None
    background_options: Annotated[Any, doc("Not available.", None, neutral=({},))] = None
    image: Annotated[Any, doc("Not available.", None, neutral=({},))] = None
    access_programs: Annotated[Any, doc("Not available.", None, neutral=({},))] = None
    top_k: Annotated[Whole | None, doc("Shoal's own: only the best k tokens; 0 is off.", 40)] = None
    min_p: Annotated[float | None, doc("Shoal's own: least share of the best token's probability.", 0.0)] = None
    seed: Annotated[Whole | None, doc("Shoal's own: the same seed draws the same answer.", 1)] = None
    stop: Annotated[str | list[str] | None, doc("Shoal's own: texts that end the answer.", ["\n\n"])] = None
    repetition_penalty: Annotated[float | None, doc("Shoal's own: above 1, fewer repetitions.", 1.0)] = None
    presence_penalty: Annotated[float | None, doc("Shoal's own: −2 to 2.", 0.0)] = None
    frequency_penalty: Annotated[float | None, doc("Shoal's own: −2 to 2.", 0.0)] = None
    ignore_eos: Annotated[bool | None, doc("Shoal's own: do not stop before max_output_tokens.", False)] = None
    priority: Annotated[Whole | None, doc("Shoal's own: lower runs first.", 0)] = None
    timeout: Annotated[float | None, doc("Shoal's own: seconds after which it is given up.", 30.0)] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, doc("Shoal's own: variables for the chat template.", {"enable_thinking": False})
    ] = None


# --- answers ---------------------------------------------------------------------------------------------


class OutputText(Struct, tag_field="type", tag="output_text"):
    """Text of an answer."""

    text: Annotated[str, doc("The text.", "Hello!")]
    annotations: Annotated[list[Any], doc("Always empty.", [])] = []
    logprobs: Annotated[list[Any], doc("As in the chat form, where `include` asks for them.", [])] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """What the model thought."""

    text: Annotated[str, doc("The thoughts.", "A greeting.")]


class OutputMessage(Struct, tag_field="type", tag="message", kw_only=True):
    """A message of the answer."""

    id: Annotated[str, doc("Names the item.", "msg_0123456789abcdef")]
    role: Annotated[str, doc("Always assistant.", "assistant")] = "assistant"
    status: Annotated[str, doc("in_progress, completed or incomplete.", "completed")] = "in_progress"
    content: Annotated[list[OutputText], doc("Its text.")] = []


class FunctionCall(Struct, tag_field="type", tag="function_call", kw_only=True):
    """A call of the answer."""

    id: Annotated[str, doc("Names the item.", "fc_0123456789abcdef")]
    call_id: Annotated[str, doc("To be named by its output.", "call_0123456789abcdef")]
    name: Annotated[str, doc("The function.", "get_weather")]
    arguments: Annotated[str, doc("JSON text.", '{"city": "Paris"}')] = ""
    status: Annotated[str, doc("in_progress, completed or incomplete.", "completed")] = "in_progress"


class ReasoningItem(Struct, tag_field="type", tag="reasoning", kw_only=True):
    """The thoughts before the answer."""

    id: Annotated[str, doc("Names the item.", "rs_0123456789abcdef")]
    summary: Annotated[list[Any], doc("Always empty: the thoughts themselves are answered.", [])] = []
    content: Annotated[list[ReasoningText], doc("The thoughts.")] = []
    encrypted_content: Annotated[
        str | None, doc("The thoughts to be sent back, where `include` asks for them.", None)
    ] = None
    status: Annotated[str, doc("in_progress, completed or incomplete.", "completed")] = "in_progress"


OutputItem = ReasoningItem | OutputMessage | FunctionCall


class ResponseInputDetails(Struct):
    """Of the prompt's tokens."""

    cached_tokens: Annotated[int, doc("Found in the prefix cache.", 0)]
    cache_write_tokens: Annotated[int, doc("Always 0: caching has no price.", 0)] = 0


class ResponseOutputDetails(Struct):
    """Of the answer's tokens."""

    reasoning_tokens: Annotated[int, doc("Thoughts.", 0)]


class ResponseUsage(Struct):
    """Exact token counts."""

    input_tokens: Annotated[int, doc("Of the prompt.", 12)]
    input_tokens_details: Annotated[ResponseInputDetails, doc("Which of them were cached.")]
    output_tokens: Annotated[int, doc("Of the answer.", 30)]
    output_tokens_details: Annotated[ResponseOutputDetails, doc("Which of them were thoughts.")]
    total_tokens: Annotated[int, doc("Both.", 42)]


class ResponseError(Struct):
    """Why a response failed."""

    code: Annotated[str, doc("A short name.", "server_error")]
    message: Annotated[str, doc("What happened.", "the worker died")]


class IncompleteDetails(Struct):
    """Why a response is not complete."""

    reason: Annotated[str, doc("max_output_tokens.", "max_output_tokens")]


class ResponseObject(Struct, kw_only=True):
    """A response."""

    id: Annotated[str, doc("Names the response.", _RESPONSE_ID)]
    object: Annotated[str, doc("Always response.", "response")] = "response"
    created_at: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    completed_at: Annotated[int | None, doc("Unix time in seconds; null before.", 1700000002)] = None
    status: Annotated[str, doc("queued, in_progress, completed, incomplete, failed or cancelled.", "completed")]
    background: Annotated[bool, doc("As asked.", False)] = False
    error: Annotated[ResponseError | None, doc("Why it failed.")] = None
    incomplete_details: Annotated[IncompleteDetails | None, doc("Why it is incomplete.")] = None
    instructions: Annotated[str | None, doc("As asked.", None)] = None
    max_output_tokens: Annotated[int | None, doc("As asked.", None)] = None
    max_tool_calls: Annotated[int | None, doc("As asked.", None)] = None
    model: Annotated[str, doc("Who answered.", "SmolLM2-135M-Instruct")]
    output: Annotated[list[OutputItem], doc("The answer: thoughts, messages, calls.")] = []
    parallel_tool_calls: Annotated[bool, doc("As asked.", True)] = True
    previous_response_id: Annotated[str | None, doc("As asked.", None)] = None
    reasoning: Annotated[dict[str, Any], doc("As asked.", {"effort": None, "summary": None})]
    store: Annotated[bool, doc("As asked.", True)] = True
    temperature: Annotated[float, doc("What was used.", 1.0)]
    text: Annotated[dict[str, Any], doc("As asked.", {"format": {"type": "text"}})]
    tool_choice: Annotated[str | dict[str, Any], doc("As asked.", "auto")] = "auto"
    tools: Annotated[list[dict[str, Any]], doc("As asked.", [])]
    top_logprobs: Annotated[int, doc("As asked.", 0)] = 0
    top_p: Annotated[float, doc("What was used.", 1.0)]
    truncation: Annotated[str, doc("Always disabled.", "disabled")] = "disabled"
    usage: Annotated[ResponseUsage | None, doc("Token counts; null before the end.")] = None
    user: Annotated[str | None, doc("As asked.", None)] = None
    metadata: Annotated[dict[str, str], doc("As asked.", {})]
    prompt_cache_key: Annotated[str | None, doc("As asked.", None)] = None
    safety_identifier: Annotated[str | None, doc("As asked.", None)] = None
    service_tier: Annotated[str, doc("Always default.", "default")] = "default"


class ResponseDeleted(Struct, kw_only=True):
    """Answer of DELETE /v1/responses/{id}."""

    id: Annotated[str, doc("Which response.", _RESPONSE_ID)]
    object: Annotated[str, doc("Always response.", "response")] = "response"
    deleted: Annotated[bool, doc("Always true.", True)] = True


class InputItemList(Struct, kw_only=True):
    """A page of the items that a response was asked with."""

    object: Annotated[str, doc("Always list.", "list")] = "list"
    data: Annotated[list[dict[str, Any]], doc("The items.")]
    first_id: Annotated[str | None, doc("The first one's id.", "msg_0123456789abcdef")] = None
    last_id: Annotated[str | None, doc("The last one's id: send it as `after` for the next page.", None)] = None
    has_more: Annotated[bool, doc("Whether there is a next page.", False)] = False


class InputTokens(Struct, kw_only=True):
    """Answer of POST /v1/responses/input_tokens."""

    object: Annotated[str, doc("Always response.input_tokens.", "response.input_tokens")] = (
        "response.input_tokens"
    )
    input_tokens: Annotated[int, doc("Tokens of the prompt.", 12)]


class ResponseEvent(Struct, kw_only=True):
    """One event of the stream; the fields that are there depend on `type`."""

    type: Annotated[
        str,
        doc(
            "response.created, response.output_text.delta, response.completed, …", "response.output_text.delta"
        ),
    ]
    sequence_number: Annotated[int, doc("Counts the events from 0.", 3)] = 0
    response: Annotated[ResponseObject | UnsetType, doc("Of the first and last events.")] = UNSET
    output_index: Annotated[int | UnsetType, doc("The item's place in `output`.", 0)] = UNSET
    item: Annotated[OutputItem | UnsetType, doc("An item that begins or ends.")] = UNSET
    item_id: Annotated[str | UnsetType, doc("The item that goes on.", "msg_0123456789abcdef")] = UNSET
    content_index: Annotated[int | UnsetType, doc("The part's place in the item.", 0)] = UNSET
    part: Annotated[OutputText | ReasoningText | UnsetType, doc("A part that begins or ends.")] = UNSET
    delta: Annotated[str | UnsetType, doc("What is added.", "Hello")] = UNSET
    text: Annotated[str | UnsetType, doc("A part's whole text.", "Hello!")] = UNSET
    arguments: Annotated[str | UnsetType, doc("A call's whole arguments.", '{"city": "Paris"}')] = UNSET
    name: Annotated[str | UnsetType, doc("A call's function.", "get_weather")] = UNSET
    logprobs: Annotated[list[Any] | UnsetType, doc("Of what is added.", [])] = UNSET
    code: Annotated[str | UnsetType | None, doc("Of an error.", "server_error")] = UNSET
    message: Annotated[str | UnsetType, doc("Of an error.", "the worker died")] = UNSET
    param: Annotated[str | UnsetType | None, doc("Of an error.", None)] = UNSET
