"""The body of POST /v1/completions and its answer, which is also one event of its stream."""

from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import GenerationRequest, Whole, doc
from shoal.frontend.schemas.usage import PromptLogprobs, Timings, Usage


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[str | int | list[int]],
        doc(
            "A text, a list of texts, token ids, or a list of lists of token ids. Of several prompts the "
            "choices come prompt by prompt, in their order.",
            "two steps to build a house:",
        ),
    ]
    logprobs: Annotated[
        Whole | bool | None,
        doc(
            "0 to 20: the choices have the log-probability of each token and those of so many likeliest ones. "
            "Default (and for false): none.",
            1,
        ),
    ] = None
    top_logprobs: Annotated[
        Any, doc("Belongs to chat; here `logprobs` says the number. 0 is taken.", 0, neutral=(0,))
    ] = None
    best_of: Annotated[
        Whole | None,
        doc(
            "So many answers are generated to each prompt, at most 16, and the `n` with the highest mean "
            "log-probability a token are returned, best first; usage counts all. Not with `stream`. Default: "
            "`n`.",
            1,
        ),
    ] = None
    echo: Annotated[
        bool | None,
        doc(
            "The text begins with the prompt; with `logprobs` so do they. `max_tokens: 0` is then allowed: the "
            "prompt alone. Default false.",
            False,
        ),
    ] = None
    suffix: Annotated[
        str | None,
        doc(
            "What follows the answer, for models trained to fill in the middle; others refuse it. Default (and "
            'for ""): nothing.',
            "",
        ),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        doc("Whether text prompts get the model's token for the beginning of a text. Default true.", True),
    ] = None
    do_preprocess: Annotated[
        Any, doc("Prompts are taken as they are, without a chat template: false.", False, neutral=(False,))
    ] = None


class CompletionLogprobs(Struct):
    """Log-probabilities in the completions form: parallel lists, an entry a token."""

    tokens: Annotated[
        list[str], doc("Their texts; `bytes:\\xe2\\x80` where one is a part of a character.", [" a"])
    ]
    token_logprobs: Annotated[
        list[float | None],
        doc("Natural logarithms of their probabilities; null for the first token of an echoed prompt.", [-0.5]),
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None],
        doc("The likeliest tokens there by text, the token itself included; null as above.", [{" a": -0.5}]),
    ]
    text_offset: Annotated[list[int], doc("Where in `text` they begin, in characters.", [0])]


class CompletionChoice(Struct):
    """One answer, or what a chunk adds to it."""

    index: Annotated[int, doc("Which one, from 0; prompt by prompt.", 0)]
    text: Annotated[
        str, doc("The answer, behind the prompt with `echo`; in a stream what is new of it.", " First,")
    ]
    finish_reason: Annotated[
        str | None,
        doc(
            "`stop`: the model or a stop string ended it; `length`: its tokens were used up; `repetition`: it "
            "went in circles; `abort`: somebody ended it. In a stream null but in a choice's last chunk.",
            "length",
        ),
    ] = None
    stop_reason: Annotated[
        str | int | None, doc("The stop string or stop id that ended it; null for the model's own end.", None)
    ] = None
    logprobs: Annotated[CompletionLogprobs | None, doc("Where they were asked for.", None)] = None
    token_ids: Annotated[
        list[int] | UnsetType, doc("Where asked for: its tokens, the one that ended it included.", [718, 28])
    ] = UNSET
    prompt_token_ids: Annotated[
        list[int] | UnsetType,
        doc("Where asked for: the tokens of its prompt; in a stream in the choice's first chunk.", [10622]),
    ] = UNSET
    prompt_logprobs: Annotated[
        PromptLogprobs | UnsetType,
        doc("Where asked for: for each prompt token, by token id, itself and its likeliest rivals.", [None]),
    ] = UNSET


class Completion(Struct):
    """Answer of POST /v1/completions; also one event of its stream."""

    id: Annotated[str, doc("Names this answer: `cmpl-` and the request's id.", "cmpl-5f2c")]
    created: Annotated[int, doc("When it was made, Unix seconds.", 1767225600)]
    model: Annotated[str, doc("The served model.", "SmolLM2-135M-Instruct")]
    choices: Annotated[
        list[CompletionChoice], doc("The answers; in a stream one, or none in the chunks of the end.", [])
    ]
    system_fingerprint: Annotated[str, doc("Which server, and which version of it.", "shoal-0.1.0")]
    usage: Annotated[
        Usage | UnsetType | None,
        doc("Exact token counts; in a stream where `stream_options` ask for it.", {}),
    ] = UNSET
    object: Annotated[str, doc("`text_completion`.", "text_completion")] = "text_completion"
    service_tier: Annotated[str | UnsetType, doc("`default`, where the request named a tier.", "default")] = (
        UNSET
    )
    metadata: Annotated[dict[str, str] | UnsetType, doc("As the request gave it.", {"topic": "demo"})] = UNSET
    timings: Annotated[Timings | UnsetType, doc("Where asked for: how long it took.", {})] = UNSET
