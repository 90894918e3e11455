"""What all request bodies share. Field names are the contract: see API.md.

Every field carries ``doc``: a description and an example, which /openapi.json shows. A field that the contract has and
Shoal does not honour is declared with the values that ask for nothing (``neutral``); ``checks.py`` refuses all
others. Numbers that stand for integers are ``Whole``: 64.0 is 64.
"""

from typing import Annotated, Any

from shoal.frontend.schemas.fields import RequestBody as RequestBody
from shoal.frontend.schemas.fields import Whole as Whole
from shoal.frontend.schemas.fields import doc as doc
from shoal.frontend.schemas.fields import neutral_values as neutral_values
from shoal.frontend.schemas.formats import ResponseFormat, StructuredOutputs


class StreamOptions(RequestBody):
    """What a stream carries besides text; only with `stream: true`."""

    include_usage: Annotated[
        bool | None,
        doc(
            "One more chunk before `[DONE]`, without choices, has the usage of the whole request; all others "
            "then have `usage: null`. Default false.",
            True,
        ),
    ] = None
    continuous_usage_stats: Annotated[
        bool | None,
        doc("Every chunk, the first included, has the usage up to its point. Default false.", True),
    ] = None
    include_obfuscation: Annotated[
        Any,
        doc(
            "OpenAI's padding of chunks against listeners who measure their sizes. Not done here, so only "
            "false is taken; use TLS.",
            False,
            neutral=(False,),
        ),
    ] = None


class RepetitionDetection(RequestBody, kw_only=True):
    """When a sequence that goes in circles ends: its last tokens are one pattern, again and again."""

    max_pattern_size: Annotated[
        Whole,
        doc("Tokens of the longest pattern that is looked for, 0 to 256; 0 switches the search off.", 20),
    ]
    min_pattern_size: Annotated[
        Whole | None,
        doc("Tokens of the shortest one, at most `max_pattern_size`. Default (and for 0) 1.", 2),
    ] = None
    min_count: Annotated[
        Whole, doc("How often in a row the pattern must stand before the answer ends, 2 to 10000.", 4)
    ]


class PromptCacheOptions(RequestBody):
    """OpenAI's options for its prompt cache. Here every prompt's beginning is cached by itself."""

    mode: Annotated[str | None, doc("`implicit` or `explicit`. A hint that changes nothing.", "implicit")] = (
        None
    )
    ttl: Annotated[str | None, doc("How long a prefix should live. A hint that changes nothing.", "30m")] = None


class GenerationRequest(RequestBody):
    """What both routes take."""

    model: Annotated[
        str | None,
        doc(
            "Id of the served model, as `GET /v1/models` lists it; another one is a 404 that names it. "
            "Default: the served one.",
            "SmolLM2-135M-Instruct",
        ),
    ] = None

    # how tokens are drawn

    temperature: Annotated[
        float | None,
        doc(
            "How far the draw departs from the likeliest token, 0 to 2; 0 always takes the likeliest. Default: "
            "the model's generation_config.json, else 1.",
            0.7,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        doc(
            "Draws only among the likeliest tokens that together have this probability, above 0 and at most 1. "
            "Default: the model's generation_config.json, else 1 (off).",
            0.95,
        ),
    ] = None
    top_k: Annotated[
        Whole | None,
        doc(
            "Draws only among so many of the likeliest tokens; 0 or -1 is off. Default: the model's "
            "generation_config.json, else 0.",
            40,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        doc(
            "Drops tokens that are less probable than this share of the likeliest one, 0 to 1. Default: the "
            "model's generation_config.json, else 0 (off).",
            0.05,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        doc(
            "Divides (positive) or multiplies (negative) the logits of tokens that stand in the prompt or the "
            "answer, 0.01 to 10; above 1 discourages them. Default: the model's generation_config.json, else 1 "
            "(off).",
            1.1,
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        doc("Subtracted from the logit of every token that the answer has already, -2 to 2. Default 0.", 0.5),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        doc(
            "Subtracted from a token's logit once for each time that the answer has it, -2 to 2. Default 0.",
            0.5,
        ),
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None,
        doc(
            "Token ids (as strings) and what is added to their logits, -100 to 100; at most 4096 of them.",
            {"50": -100},
        ),
    ] = None
    allowed_token_ids: Annotated[
        list[Whole] | None,
        doc(
            "Only these tokens are drawn. Name an end-of-sequence id too where the answer shall end by itself. "
            "Default: all.",
            [49, 50, 51],
        ),
    ] = None
    bad_words: Annotated[
        list[str] | None,
        doc(
            "Texts that the answer never has, spelled as they stand at the beginning, behind a space and "
            "within a word; at most 256 of at most 256 characters each.",
            ["unfortunately"],
        ),
    ] = None
    seed: Annotated[
        Whole | None,
        doc(
            "The same request with the same seed draws the same tokens, whatever else the server does "
            "meanwhile; -2^63 to 2^63-1. Default: a random one.",
            42,
        ),
    ] = None
    n: Annotated[
        Whole | None,
        doc("Answers to each prompt, 1 to 16. The first is what n=1 gives for the same seed. Default 1.", 1),
    ] = None

    # where an answer ends

    max_tokens: Annotated[
        Whole | None,
        doc(
            "Most tokens of the answer, at least 1. Prompt and answer together must fit the context length, "
            "else 400 with the numbers. Default: what fits (chat), 16 (completions).",
            64,
        ),
    ] = None
    max_completion_tokens: Annotated[
        Whole | None, doc("OpenAI's newer name for `max_tokens`; where both are given they must agree.", 64)
    ] = None
    min_tokens: Annotated[
        Whole | None,
        doc(
            "Before so many tokens were generated the answer does not end by itself and stop strings are not "
            "looked for; at most `max_tokens`. Default 0.",
            8,
        ),
    ] = None
    min_new_tokens: Annotated[
        Whole | None, doc("LMDeploy's name for `min_tokens`; where both are given they must agree.", 8)
    ] = None
    stop: Annotated[
        str | list[str] | bool | None,
        doc(
            "A string, or up to 16, of at most 1024 characters: the answer ends before the first of them. "
            "Default none; false is none too.",
            ["\n\n"],
        ),
    ] = None
    stop_token_ids: Annotated[
        list[Whole] | None,
        doc("Up to 256 token ids, each of which ends the answer when it is drawn. Default none.", [2]),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None,
        doc(
            "Whether the text has the stop string, or the stop token's text, that ended it. Default false.",
            False,
        ),
    ] = None
    ignore_eos: Annotated[
        bool | None,
        doc("Goes on after the model's own end-of-sequence tokens, up to `max_tokens`. Default false.", False),
    ] = None
    repetition_detection: Annotated[
        RepetitionDetection | bool | None,
        doc(
            "Ends an answer that goes in circles, with `finish_reason: repetition`. Default (and for false): "
            "never.",
            {"max_pattern_size": 20, "min_count": 4},
        ),
    ] = None
    timeout: Annotated[
        float | None,
        doc(
            "Seconds from now, above 0 and at most 86400, after which the request ends with 408, also while it "
            "is queued. The header `X-Request-Timeout` says the same; the shorter counts. Default: none.",
            30,
        ),
    ] = None

    # what the answer shows

    stream: Annotated[
        bool | None, doc("Sends the answer as server-sent events while it is generated. Default false.", False)
    ] = None
    stream_options: Annotated[
        StreamOptions | None,
        doc("What a stream carries besides text; only with `stream: true`.", {"include_usage": True}),
    ] = None
    skip_special_tokens: Annotated[
        bool | None,
        doc("Leaves the model's special tokens (end of turn, …) out of the text. Default true.", True),
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None,
        doc(
            "Text is made of the tokens' exact bytes with nothing put between them, special tokens included: "
            "so true and false give the same.",
            True,
        ),
    ] = None
    prompt_logprobs: Annotated[
        Whole | None,
        doc(
            "0 to 20: the answer has `prompt_logprobs`, each prompt token's log-probability and those of so "
            "many likeliest ones. Not with `stream`. Default: none.",
            1,
        ),
    ] = None
    return_token_ids: Annotated[
        bool | None,
        doc("The answer has `prompt_token_ids`, and its choices `token_ids`. Default false.", False),
    ] = None
    timings_per_token: Annotated[
        bool | None,
        doc(
            "The answer (of a stream: one more chunk, without choices, before `[DONE]`) has `timings`. Default "
            "false.",
            False,
        ),
    ] = None

    # how the request is treated

    priority: Annotated[
        Whole | None,
        doc("Lower goes first in the queue, and may displace what runs; -2^31 to 2^31. Default 0.", 0),
    ] = None
    cache_salt: Annotated[
        str | None,
        doc(
            "Only requests with the same salt share cached prefixes, so that nobody can guess another's prompt "
            "by timing; at most 1024 characters. Default: the salt of all that give none.",
            "a-long-random-secret",
        ),
    ] = None

    # hints, which change no token

    user: Annotated[str | None, doc("Your name for the end user; stands in the server's log.", "user-1234")] = (
        None
    )
    safety_identifier: Annotated[
        str | None, doc("OpenAI's newer name for `user`; stands in the server's log.", "user-1234")
    ] = None
    metadata: Annotated[
        dict[str, str] | None,
        doc(
            "Up to 16 keys of at most 64 characters with values of at most 512; the answer has them again.",
            {"topic": "demo"},
        ),
    ] = None
    store: Annotated[
        bool | None,
        doc(
            "Accepted as a hint: answers of this route are not kept; `/v1/responses` keeps its own. Default "
            "false.",
            False,
        ),
    ] = None
    service_tier: Annotated[
        Any,
        doc(
            "`auto` or `default`: there is one tier, and the answer says `default`. See `priority`.",
            "auto",
            neutral=("auto", "default"),
        ),
    ] = None
    prompt_cache_key: Annotated[
        str | None,
        doc(
            "Accepted as a hint: cached prefixes are found by their tokens, so no key is needed.",
            "conversation-7",
        ),
    ] = None
    prompt_cache_retention: Annotated[
        str | None,
        doc("Accepted as a hint: a prefix stays until its memory is needed.", "24h"),
    ] = None
    prompt_cache_options: Annotated[
        PromptCacheOptions | None,
        doc("Accepted as a hint: every prompt's beginning is cached by itself.", {"mode": "implicit"}),
    ] = None
    session_id: Annotated[
        Whole | str | None,
        doc(
            "Accepted as a hint: stands in the server's log. Cached prefixes are found by their tokens. For "
            "conversations kept on the server see `/v1/chat/interactive`.",
            -1,
        ),
    ] = None

    # what clients of LMDeploy send

    adapter_name: Annotated[
        str | None,
        doc('A LoRA adapter; none is served, so every name is a 404. Default (and for "") none.', ""),
    ] = None
    image_url: Annotated[
        Any, doc('The served models read text only: null, "" and [] are taken.', None, neutral=("", []))
    ] = None
    kwargs: Annotated[Any, doc("LMDeploy's client sends an empty object.", {}, neutral=({},))] = None
    return_logprob: Annotated[
        Any, doc("LMDeploy's word for it in `/generate`: here say `logprobs`.", False, neutral=(False,))
    ] = None
    repetition_ngram_size: Annotated[
        Any, doc("LMDeploy's search for repetitions: say `repetition_detection`.", 0, neutral=(0,))
    ] = None
    repetition_ngram_threshold: Annotated[
        Any, doc("LMDeploy's search for repetitions: say `repetition_detection`.", 0, neutral=(0,))
    ] = None
    image_data: Annotated[Any, doc("For models that see.", None, neutral=("", []))] = None
    media_io_kwargs: Annotated[Any, doc("For models that see.", None, neutral=({},))] = None
    mm_processor_kwargs: Annotated[Any, doc("For models that see.", None, neutral=({},))] = None
    return_routed_experts: Annotated[Any, doc("For models with experts.", False, neutral=(False,))] = None

    # what the answer must match

    response_format: Annotated[
        ResponseFormat | None,
        doc(
            "What form the text has, held while it is generated. JSON has at most one space after a comma and a "
            "colon, and no other white space. Default: any. Only one of this, `structured_outputs` and `guided_…`.",
            {"type": "json_object"},
        ),
    ] = None
    structured_outputs: Annotated[
        StructuredOutputs | None,
        doc(
            "vLLM's form of the same: one of json, regex, choice, grammar, json_object.", {"choice": ["a", "b"]}
        ),
    ] = None
    guided_json: Annotated[
        str | dict[str, Any] | None,
        doc("A JSON schema, also as JSON text, that the answer matches.", {"type": "object"}),
    ] = None
    guided_regex: Annotated[
        str | None,
        doc("A regular expression (Rust's syntax, no look-around) that the whole answer matches.", "[0-9]{4}"),
    ] = None
    guided_choice: Annotated[list[str] | None, doc("The answer is one of these.", ["yes", "no"])] = None
    guided_grammar: Annotated[
        str | None,
        doc("A grammar (Lark's syntax, or GBNF) that the answer matches.", 'start: "yes" | "no"'),
    ] = None
