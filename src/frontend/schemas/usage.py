"""What several routes answer: token counts, times, log-probabilities of a prompt."""

from typing import Annotated

import msgspec
from msgspec import Struct

from shoal.frontend.schemas.fields import doc


class PromptDetails(Struct):
    """What is known of the prompt's tokens."""

    cached_tokens: Annotated[
        int, doc("Those whose keys and values were found in the prefix cache, so that they cost nothing.", 16)
    ] = 0


class CompletionDetails(Struct):
    """What is known of the generated tokens."""

    reasoning_tokens: Annotated[int, doc("Those of the model's thinking.", 0)] = 0


class Usage(Struct):
    """Exact token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: Annotated[int, doc("Tokens of all prompts.", 12)]
    completion_tokens: Annotated[
        int, doc("Generated tokens of all choices, those that `best_of` did not choose included.", 20)
    ]
    total_tokens: Annotated[int, doc("Both together.", 32)]
    prompt_tokens_details: Annotated[
        PromptDetails, doc("What is known of the prompt's tokens.", {"cached_tokens": 0})
    ]
    completion_tokens_details: Annotated[
        CompletionDetails, doc("What is known of the generated tokens.", {"reasoning_tokens": 0})
    ] = msgspec.field(default_factory=CompletionDetails)


class Timings(Struct):
    """How long a request took, with the names of llama.cpp's server; of several sequences the slowest one's."""

    queue_ms: Annotated[float, doc("Milliseconds from arrival to the start of the computation.", 0.4)]
    cache_n: Annotated[int, doc("Prompt tokens found in the prefix cache.", 16)]
    prompt_n: Annotated[int, doc("Prompt tokens that were computed.", 12)]
    prompt_ms: Annotated[float, doc("Milliseconds from the start to the first generated token.", 35.1)]
    prompt_per_token_ms: Annotated[float, doc("Milliseconds a computed prompt token.", 2.9)]
    prompt_per_second: Annotated[float, doc("Prompt tokens computed a second.", 341.9)]
    predicted_n: Annotated[int, doc("Generated tokens.", 20)]
    predicted_ms: Annotated[float, doc("Milliseconds from the first generated token to the last.", 180.2)]
    predicted_per_token_ms: Annotated[float, doc("Milliseconds a generated token behind the first.", 9.0)]
    predicted_per_second: Annotated[float, doc("Generated tokens behind the first a second.", 111.0)]


class PromptLogprob(Struct):
    """A token that could stand at one place of the prompt."""

    logprob: Annotated[float, doc("Natural logarithm of its probability.", -0.31)]
    rank: Annotated[
        int | None,
        doc("1 for the likeliest; null for the prompt's own token where it is not among those asked for.", 1),
    ]
    decoded_token: Annotated[str, doc("Its text.", " sky")]


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each prompt token, by token id: itself and its likeliest rivals. The first has none: null."""
