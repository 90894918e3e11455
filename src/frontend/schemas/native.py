"""The bodies and answers of POST /generate (LMDeploy's and SGLang's native forms) and POST /get_ppl (LMDeploy's)."""

from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import RequestBody, Whole, doc

_MODEL = doc("The served model's name; may be left out.", "SmolLM2-135M-Instruct")


class SamplingFields(RequestBody):
    """How tokens are drawn, and when an answer ends. Unset values are the model's own, else OpenAI's."""

    temperature: Annotated[float | None, doc("0 always takes the likeliest token; 0 to 2.", 0.7)] = None
    top_p: Annotated[float | None, doc("Draws among the likeliest tokens of this mass together.", 0.9)] = None
    top_k: Annotated[Whole | None, doc("Draws among so many of the likeliest; 0 or -1: off.", 40)] = None
    min_p: Annotated[float | None, doc("Leaves out what is less likely than this part of the best.", 0.05)] = (
        None
    )
    repetition_penalty: Annotated[float | None, doc("Above 1: what was said gets less likely.", 1.0)] = None
    presence_penalty: Annotated[float | None, doc("Taken from the logit of what was generated.", 0.0)] = None
    frequency_penalty: Annotated[float | None, doc("The same for each time it was.", 0.0)] = None
    stop: Annotated[str | list[str] | None, doc("Texts that end the answer.", "\n\n")] = None
    stop_token_ids: Annotated[list[Whole] | None, doc("Ids that end the answer.", [2])] = None
    ignore_eos: Annotated[bool | None, doc("Goes on after the model's own end.", False)] = None
    skip_special_tokens: Annotated[bool | None, doc("Leaves special tokens out of the text.", True)] = None
    spaces_between_special_tokens: Annotated[
        bool | None, doc("Nothing is put between special tokens that show: both mean the same.", True)
    ] = None
    logit_bias: Annotated[dict[str, float] | None, doc("Token id: added to its logit.", {"17": -5})] = None


class SamplingParams(SamplingFields):
    """SGLang's ``sampling_params``."""

    max_new_tokens: Annotated[Whole | None, doc("Most new tokens; 128 where unset.", 128)] = None
    min_new_tokens: Annotated[Whole | None, doc("Before so many, the answer does not end.", 0)] = None
    n: Annotated[Whole | None, doc("How many answers to each prompt.", 1)] = None
    no_stop_trim: Annotated[bool | None, doc("Shows what ended the answer.", False)] = None
    sampling_seed: Annotated[Whole | None, doc("The same seed draws the same answer.", 1)] = None
    json_schema: Annotated[Any, doc("Not here: use /v1/completions.", None, neutral=("",))] = None
    regex: Annotated[Any, doc("Not here: use /v1/completions.", None, neutral=("",))] = None
    ebnf: Annotated[Any, doc("Not here: use /v1/completions.", None, neutral=("",))] = None
    structural_tag: Annotated[Any, doc("Not available.", None, neutral=("",))] = None
    stop_regex: Annotated[Any, doc("Not available.", None, neutral=("", []))] = None
    custom_params: Annotated[Any, doc("Not available.", None, neutral=({},))] = None


class NativeRequest(SamplingFields):
    """POST /generate, in SGLang's form (``text`` or ``sampling_params``) or in LMDeploy's (``prompt``)."""

    prompt: Annotated[str | None, doc("A raw prompt.", "The capital of France is")] = None
    text: Annotated[str | list[str] | None, doc("The same, or several, as SGLang names it.", "Once upon")] = (
        None
    )
    input_ids: Annotated[
        list[Whole | list[Whole]] | None, doc("The prompt's token ids, or several lists of them.", [504, 3575])
    ] = None
    sampling_params: Annotated[
        SamplingParams | None, doc("How to sample, in SGLang's form.", {"temperature": 0})
    ] = None
    max_tokens: Annotated[Whole | None, doc("Most new tokens; 128 where unset.", 128)] = None
    seed: Annotated[Whole | None, doc("The same seed draws the same answer.", 1)] = None
    include_stop_str_in_output: Annotated[bool | None, doc("Shows what ended the answer.", False)] = None
    stream: Annotated[bool | None, doc("Answers bit by bit: server-sent events.", False)] = None
    return_logprob: Annotated[bool | None, doc("Each token's log-probability.", False)] = None
    top_logprobs_num: Annotated[Whole | None, doc("And those of so many of the likeliest; 0 to 20.", 0)] = None
    logprob_start_len: Annotated[
        Whole | None, doc("From which of the prompt's tokens on theirs are told too; -1: of none.", -1)
    ] = None
    return_text_in_logprobs: Annotated[bool | None, doc("Each token's text beside its id.", False)] = None
    rid: Annotated[str | None, doc("Names the request, for /abort_request.", "my-request-1")] = None
    model: Annotated[str | None, _MODEL] = None
    timeout: Annotated[float | None, doc("Seconds until the request is given up.", 60)] = None
    priority: Annotated[Whole | None, doc("Lower runs first.", 0)] = None
    session_id: Annotated[Whole | None, doc("A hint; equal beginnings are cached anyway.", -1)] = None
    image_data: Annotated[Any, doc("For models that see; not available.", None, neutral=([], ""))] = None
    return_hidden_states: Annotated[Any, doc("Not available.", None, neutral=(False,))] = None
    return_routed_experts: Annotated[Any, doc("Not available.", None, neutral=(False,))] = None
    repetition_ngram_size: Annotated[Any, doc("Not available.", 0, neutral=(0,))] = None
    repetition_ngram_threshold: Annotated[Any, doc("Not available.", 0, neutral=(0,))] = None
    lora_path: Annotated[Any, doc("Not available.", None, neutral=("",))] = None
    mm_processor_kwargs: Annotated[Any, doc("Not available.", None, neutral=({},))] = None
    media_io_kwargs: Annotated[Any, doc("Not available.", None, neutral=({},))] = None


Scores = list[list[float | int | str | None]]
"""[log-probability, token id] for each token; in SGLang's form [log-probability, token id, text or null]."""


class NativeEnd(Struct, omit_defaults=True):
    """How an answer ended."""

    type: Annotated[str, doc("stop, length or abort.", "stop")]
    matched: Annotated[str | int | UnsetType | None, doc("The text or id that ended it.", 2)] = UNSET
    length: Annotated[int | UnsetType, doc("Tokens, where their number ended it.", 128)] = UNSET


class NativeMeta(Struct):
    """What there is to know of an answer besides its text."""

    id: Annotated[str, doc("The request's id.", "0123456789abcdef")]
    prompt_tokens: Annotated[int, doc("Of the prompt.", 6)]
    completion_tokens: Annotated[int, doc("Of the answer, up to here.", 8)]
    cached_tokens: Annotated[int, doc("Of the prompt's, those found in the prefix cache; known at the end.", 0)]
    finish_reason: Annotated[NativeEnd | None, doc("Null until the end.", {"type": "stop", "matched": 2})] = (
        None
    )
    output_token_logprobs: Annotated[
        Scores | None,
        doc("[log-probability, id] of each new token; in SGLang's form with its text.", [[-0.1, 17]]),
    ] = None
    output_top_logprobs: Annotated[
        list[Scores] | UnsetType, doc("The likeliest at each place.", [[[-0.1, 17]]])
    ] = UNSET
    input_token_logprobs: Annotated[
        Scores | UnsetType, doc("Of the prompt's tokens from `logprob_start_len` on.", [[-2.5, 3575]])
    ] = UNSET
    input_top_logprobs: Annotated[
        list[Scores] | UnsetType, doc("The likeliest in their places.", [[[-0.1, 17]]])
    ] = UNSET


class NativeAnswer(Struct):
    """Answer of POST /generate, and one event of its stream. Several prompts, or ``n``, are answered by a list."""

    text: Annotated[str, doc("The answer; in LMDeploy's stream, what is new of it.", " Paris.")]
    output_ids: Annotated[list[int], doc("Its token ids, likewise.", [7042, 30])]
    meta_info: Annotated[NativeMeta, doc("Counts, how it ended, log-probabilities.")]
    index: Annotated[int | UnsetType, doc("Which answer, where there are several.", 0)] = UNSET


class PPLRequest(RequestBody):
    """POST /get_ppl."""

    input: Annotated[
        str | list[str | Whole | list[Whole]],
        doc(
            "A text, several, token ids, or several lists of them; at least two tokens each.",
            "The sky is blue.",
        ),
    ]
    model: Annotated[str | None, _MODEL] = None
    add_special_tokens: Annotated[
        bool | None, doc("Adds the special tokens that the model wants around a raw text, if any.", True)
    ] = None
    timeout: Annotated[float | None, doc("Seconds until the request is given up.", 60)] = None
    priority: Annotated[Whole | None, doc("Lower runs first.", 0)] = None


class PPLAnswer(Struct):
    """Answer of POST /get_ppl; lists where several inputs were sent."""

    ppl: Annotated[
        float | list[float],
        doc("The mean negative log-likelihood of a token in nats: what LMDeploy calls so.", 3.21),
    ]
    perplexity: Annotated[float | list[float], doc("e to its power: the perplexity.", 24.8)]
    tokens: Annotated[int | list[int], doc("Tokens that were scored: all but the first.", 5)]
