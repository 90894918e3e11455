"""The bodies and answers of POST /v1/embeddings (OpenAI's) and POST /pooling (vLLM's)."""

from typing import Annotated, Literal

from msgspec import Struct

from shoal.frontend.schemas.base import RequestBody, Whole, doc


class EmbeddingsRequest(RequestBody):
    """POST /v1/embeddings."""

    input: Annotated[
        str | list[str | Whole | list[Whole]],
        doc("A text, several, token ids, or several lists of them.", "Hello!", ["Hello!", "Bye."], [19556, 17]),
    ]
    model: Annotated[str | None, doc("The served model's name; may be left out.", "Qwen3-Embedding-0.6B")] = (
        None
    )
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        doc("`base64`: the vector as little-endian float32, in Base64: a third of the bytes.", "float"),
    ] = None
    dimensions: Annotated[
        Whole | None,
        doc("Keeps so many leading numbers and normalises them anew, as models trained for it allow.", None),
    ] = None
    pooling: Annotated[
        Literal["mean", "last"] | None,
        doc("How hidden states become one vector; by default as the model's files have it, else mean.", "mean"),
    ] = None
    normalize: Annotated[bool | None, doc("Makes each vector of length 1.", True)] = None
    add_special_tokens: Annotated[
        bool | None, doc("Adds the special tokens that the model wants around a raw text, if any.", True)
    ] = None
    priority: Annotated[Whole | None, doc("Lower runs first.", 0)] = None
    timeout: Annotated[float | None, doc("Seconds until the request is given up, in the queue too.", 60)] = None
    user: Annotated[str | None, doc("Recorded in the log.", "user-1")] = None


class PoolingRequest(EmbeddingsRequest):
    """POST /pooling."""

    task: Annotated[Literal["embed"] | None, doc("Only sentence vectors are served.", "embed")] = None
    use_activation: Annotated[bool | None, doc("vLLM's name of `normalize`.", True)] = None


class EmbeddingsUsage(Struct):
    """Exact token counts."""

    prompt_tokens: Annotated[int, doc("Tokens of all inputs.", 2)]
    total_tokens: Annotated[int, doc("The same: nothing is generated.", 2)]


class Embedding(Struct):
    """The vector of one input."""

    index: Annotated[int, doc("The input's place.", 0)]
    embedding: Annotated[list[float] | str, doc("The vector, or its Base64.", [0.6, -0.8])]
    object: Annotated[str, doc("Always embedding.", "embedding")] = "embedding"


class Embeddings(Struct):
    """Answer of POST /v1/embeddings."""

    model: Annotated[str, doc("The served model's name.", "Qwen3-Embedding-0.6B")]
    data: Annotated[list[Embedding], doc("One for each input, in order.")]
    usage: Annotated[EmbeddingsUsage, doc("Token counts.")]
    object: Annotated[str, doc("Always list.", "list")] = "list"


class PooledData(Struct):
    """The vector of one input."""

    index: Annotated[int, doc("The input's place.", 0)]
    data: Annotated[list[float] | str, doc("The vector, or its Base64.", [0.6, -0.8])]
    object: Annotated[str, doc("Always pooling.", "pooling")] = "pooling"


class PoolingAnswer(Struct):
    """Answer of POST /pooling."""

    id: Annotated[str, doc("Names the answer.", "pool-0123456789abcdef")]
    created: Annotated[int, doc("Unix time in seconds.", 1700000000)]
    model: Annotated[str, doc("The served model's name.", "Qwen3-Embedding-0.6B")]
    data: Annotated[list[PooledData], doc("One for each input, in order.")]
    usage: Annotated[EmbeddingsUsage, doc("Token counts.")]
    object: Annotated[str, doc("Always list.", "list")] = "list"
