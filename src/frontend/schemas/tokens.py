"""The bodies and answers of /v1/encode (LMDeploy's), /tokenize, /detokenize (vLLM's and SGLang's) and
/apply_template."""

from typing import Annotated, Any

from msgspec import Struct

from shoal.frontend.schemas.base import RequestBody, Whole, doc
from shoal.frontend.schemas.chat import ChatMessage
from shoal.frontend.schemas.tools import Tool

_MODEL = doc("The served model's name; may be left out.", "SmolLM2-135M-Instruct")


class EncodeRequest(RequestBody):
    """POST /v1/encode."""

    input: Annotated[str | list[str], doc("The text, or several.", "Hello!", ["Hello!", "Bye."])]
    do_preprocess: Annotated[
        bool | None,
        doc(
            "Puts each text through the chat template first, as one user message; the template then writes what "
            "begins a prompt, and `add_bos` has nothing to add.",
            False,
        ),
    ] = False
    add_bos: Annotated[
        bool | None, doc("Adds the special tokens that the model wants around a raw prompt, if any.", True)
    ] = True


class EncodeAnswer(Struct):
    """Token ids; lists of them where several texts were sent."""

    input_ids: Annotated[list[int | list[int]], doc("The ids, or a list of them for each text.", [19556, 17])]
    length: Annotated[int | list[int], doc("How many they are, or how many for each text.", 2)]


class TemplateRequest(RequestBody):
    """What the chat template is given."""

    model: Annotated[str | None, _MODEL] = None
    messages: Annotated[
        list[ChatMessage] | None, doc("The conversation.", [{"role": "user", "content": "Hello!"}])
    ] = None
    add_generation_prompt: Annotated[bool | None, doc("Ends with what begins an answer.", True)] = None
    continue_final_message: Annotated[
        bool | None, doc("Ends where the last message ends, for the model to go on there.", False)
    ] = None
    chat_template: Annotated[str | None, doc("A Jinja template to use instead of the model's.", None)] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, doc("More variables for the template.", {"enable_thinking": False})
    ] = None
    enable_thinking: Annotated[bool | None, doc("For templates that look at it.", None)] = None
    tools: Annotated[
        list[Tool] | None,
        doc(
            "Functions that the model may call, as in a chat completion.",
            [{"type": "function", "function": {"name": "get_weather"}}],
        ),
    ] = None


class ApplyTemplateRequest(TemplateRequest):
    """POST /apply_template."""


class ApplyTemplateAnswer(Struct):
    """A rendered conversation."""

    prompt: Annotated[str, doc("The text that the model reads.", "<|im_start|>user\nHello!<|im_end|>\n")]


class TokenizeRequest(TemplateRequest):
    """POST /tokenize: a raw prompt, several, or a conversation."""

    prompt: Annotated[str | list[str] | None, doc("The text, or several.", "Hello!")] = None
    add_special_tokens: Annotated[
        bool | None,
        doc(
            "Adds the special tokens that the model wants around a raw prompt; by default true for a prompt and false "
            "for a conversation, whose template has written them.",
            True,
        ),
    ] = None
    return_token_strs: Annotated[bool | None, doc("Answers each token's text too.", False)] = None
    mm_processor_kwargs: Annotated[Any, doc("For images; not available.", None, neutral=({},))] = None


class TokenizeAnswer(Struct):
    """Token ids; lists of them where several prompts were sent."""

    tokens: Annotated[list[int | list[int]], doc("The ids, or a list of them for each prompt.", [19556, 17])]
    count: Annotated[int | list[int], doc("How many they are, or how many for each prompt.", 2)]
    max_model_len: Annotated[int | None, doc("Most tokens of prompt and answer; null while loading.", 8192)]
    token_strs: Annotated[
        list[str | list[str]] | None, doc("The tokens' texts, where asked for.", ["Hello", "!"])
    ] = None


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    tokens: Annotated[list[Whole | list[Whole]], doc("Token ids, or several lists of them.", [19556, 17])]
    model: Annotated[str | None, _MODEL] = None
    skip_special_tokens: Annotated[bool | None, doc("Leaves special tokens out of the text.", False)] = False


class DetokenizeAnswer(Struct):
    """The text of token ids; a list of texts where several lists were sent."""

    prompt: Annotated[str | list[str], doc("The text, as vLLM names it.", "Hello!")]
    text: Annotated[str | list[str], doc("The same, as SGLang names it.", "Hello!")]
