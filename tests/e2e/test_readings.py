"""Perplexities and embeddings over HTTP: what the ranks read off prompts, against the decoder itself and against
transformers; and that a rank that sleeps gives its memory back."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from decoding import Driver, Sequence, load_file_or_folder
from models import default_model_path
from server import Server, running_server
from tiny_models import SHAPE
from tokenizers import decoders, models, pre_tokenizers

TEXTS = [
    "The capital of France is Paris.",
    "Water boils at a temperature of one hundred degrees, ice melts at zero. " * 20,
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Colourless green ideas sleep furiously.",
]
"""The second is longer than a step's budget."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = [
        "--dtype",
        "float32",
        "--instance_num",
        "4",
        "--session_len",
        "2048",
        "--max_prefill_token_num",
        "256",
    ]
    with running_server(str(default_model_path()), *flags) as running:
        yield running


def perplexity(server: Server, given: Any) -> dict[str, Any]:
    status, answer = server.post("/get_ppl", {"input": given})
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


def test_perplexity_is_that_of_the_decoder(server: Server) -> None:
    description, parameters = load_file_or_folder(default_model_path(), "auto")
    answer = perplexity(server, TEXTS)
    for text, ppl, found in zip(TEXTS, answer["ppl"], answer["perplexity"], strict=True):
        _, encoded = server.post("/v1/encode", {"input": text})
        ids = encoded["input_ids"]
        driver = Driver(description, parameters, 2048, num_blocks=400)
        logprobs = torch.log_softmax(driver.logits([(Sequence(ids), len(ids))]).double(), dim=-1)
        expected = -logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean().item()
        assert ppl == pytest.approx(expected, abs=1e-5)
        assert found == pytest.approx(math.exp(expected), rel=1e-4)


def test_perplexity_is_the_same_bits_alone_and_in_company(server: Server) -> None:
    alone = [perplexity(server, text)["ppl"] for text in TEXTS]
    together = perplexity(server, TEXTS)["ppl"]
    with ThreadPoolExecutor(9) as pool:
        busy = [
            pool.submit(
                server.post, "/v1/completions", {"prompt": TEXTS[0] * 9, "max_tokens": 30, "seed": seed}
            )
            for seed in range(4)
        ]
        mixed = list(pool.map(lambda text: perplexity(server, text)["ppl"], TEXTS))
        assert [job.result()[0] for job in busy] == [200] * 4
    assert together == alone
    assert mixed == alone


def test_prompt_log_probabilities_and_generated_ones_agree(server: Server) -> None:
    """What was drawn greedily, and then the same text as a prompt."""
    body = {
        "text": TEXTS[0],
        "sampling_params": {"max_new_tokens": 12, "temperature": 0},
        "return_logprob": True,
    }
    _, drawn = server.post("/generate", body)
    _, encoded = server.post("/v1/encode", {"input": TEXTS[0]})
    ids = encoded["input_ids"] + drawn["output_ids"]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    _, read = server.post("/generate", {**body, "logprob_start_len": len(encoded["input_ids"])})
    assert read["meta_info"]["input_token_logprobs"] == drawn["meta_info"]["output_token_logprobs"]


def test_a_rank_that_sleeps_gives_its_memory_back() -> None:
    question = {"prompt": TEXTS[1], "max_tokens": 4, "temperature": 0}
    with running_server(str(default_model_path()), "--instance_num", "4", "--frontends", "1") as server:
        before = server.post("/v1/completions", question)[1]["choices"][0]["text"]
        (rank,) = server.children()["rank"]
        weights = int(re.findall(r"weights_loaded .*?\bbytes=(\d+)", server.log())[0])
        resident = [resident_bytes(rank)]
        for level in (1, 2):
            assert server.post(f"/sleep?level={level}", {})[0] == 200
            resident.append(resident_bytes(rank))
            assert server.get("/ready")[0] == 503
            assert server.post("/v1/completions", question)[0] == 503
            assert server.post("/wakeup", {})[0] == 200
            status, after = server.post("/v1/completions", question)
            assert (status, after["choices"][0]["text"]) == (200, before)
        awake, without_cache, without_weights = resident
        assert awake - without_cache > 5 << 20
        assert without_cache - without_weights > 0.9 * weights


def resident_bytes(pid: int) -> int:
    """Memory that is no mapped file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


# --- embeddings ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Qwen 3 as embedding models are saved: no head, bare tensor names, sentence-transformers' files."""
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(5)
    config = transformers.Qwen3Config(**SHAPE | {"vocab_size": 258, "max_position_embeddings": 256})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1)
            )
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    write(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 84, "pooling_mode_lasttoken": True}
    )
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": n, "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    return folder, model


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@torch.inference_mode()
def states_of(model: Any, ids: list[int]) -> torch.Tensor:
    states: torch.Tensor = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states


def test_embeddings_are_transformers_pooled_states(embedder: tuple[Path, Any]) -> None:
    folder, model = embedder
    texts = ["a", "The quick brown fox", "jumps over the lazy dog. " * 8, "ünïcödé"]
    flags = ["--task", "embed", "--dtype", "float32", "--instance_num", "3", "--max_prefill_token_num", "16"]
    with running_server(str(folder), *flags) as server:
        _, encoded = server.post("/v1/encode", {"input": texts})
        states = [states_of(model, ids) for ids in encoded["input_ids"]]
        found = {}
        for pooling in (None, "mean", "last"):
            status, answer = server.post("/v1/embeddings", {"input": texts, "pooling": pooling})
            assert status == 200, answer
            found[pooling] = torch.tensor([entry["embedding"] for entry in answer["data"]])
        expected_last = torch.stack([each[-1] for each in states])
        expected_mean = torch.stack([each.mean(0) for each in states])
        normalized = torch.nn.functional.normalize
        torch.testing.assert_close(found["last"], normalized(expected_last), atol=1e-5, rtol=0)
        torch.testing.assert_close(found["mean"], normalized(expected_mean), atol=1e-5, rtol=0)
        assert torch.equal(found[None], found["last"]), "the folder says last token"
        again = server.post("/v1/embeddings", {"input": texts[2], "pooling": "mean"})[1]
        assert torch.equal(torch.tensor(again["data"][0]["embedding"]), found["mean"][2]), (
            "batches change nothing"
        )
        whole = server.post("/v1/embeddings", {"input": "x" * 256})
        assert whole[0] == 200, "a text may fill the context"
        assert server.post("/v1/embeddings", {"input": "x" * 257})[0] == 400
        status, refused = server.post("/v1/chat/completions", {"messages": "hi"})
        assert (status, refused["error"]["code"]) == (400, "wrong_task")


def test_embeddings_over_two_ranks_equal_those_of_one(embedder: tuple[Path, Any]) -> None:
    folder, _ = embedder
    answers = []
    for tp in ("1", "2"):
        with running_server(str(folder), "--task", "embed", "--dtype", "float32", "--tp", tp) as server:
            answers.append(
                server.post("/v1/embeddings", {"input": "The quick brown fox", "pooling": "mean"})[1]
            )
    one, two = (torch.tensor(answer["data"][0]["embedding"]) for answer in answers)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_the_openai_package_reads_the_vectors(embedder: tuple[Path, Any]) -> None:
    openai = pytest.importorskip("openai")
    folder, _ = embedder
    with running_server(str(folder), "--task", "embed", "--model_name", "tiny") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.embeddings.create(model="tiny", input=["hello", "there"])
        plain = client.embeddings.create(model="tiny", input="hello", encoding_format="float", dimensions=7)
    assert [len(entry.embedding) for entry in answer.data] == [84, 84]
    assert math.hypot(*answer.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert len(plain.data[0].embedding) == 7
