"""Models, health, readiness, metrics, version."""

import pytest
from frontend_kit import Kit, stats
from prometheus_client.parser import text_string_to_metric_families

from shoal import __version__
from shoal.messages import Histogram, RankStatus


def test_models() -> None:
    kit = Kit()
    (card,) = kit.get("/v1/models").json["data"]
    assert card["id"] == card["root"] == "served/model"
    assert card["max_model_len"] == 200
    assert card["created"] == 1_700_000_000
    assert card["permission"][0]["object"] == "model_permission"
    for path in ("/v1/models/served/model", "/v1/models/served%2Fmodel"):
        assert kit.get(path).json == card
    assert kit.get("/v1/models/").json == kit.get("/v1/models").json
    missing = kit.get("/v1/models/other/model")
    assert missing.status_code == 404
    assert "served/model" in missing.json["error"]["message"]


def test_health_is_about_progress() -> None:
    kit = Kit(step_timeout_s=5.0)
    assert kit.get("/health").status_code == 200
    kit.scheduler.stats = stats(stalled_ms=4_000, draining=True)
    assert kit.get("/health").status_code == 200
    kit.scheduler.stats = stats(stalled_ms=6_000, ranks=(RankStatus(0, 1, "ready"),))
    assert kit.get("/health").status_code == 503
    kit.scheduler.stats = stats(ready=False, stalled_ms=6_000, ranks=(RankStatus(0, 1, "loading"),))
    assert kit.get("/health").status_code == 200
    kit.scheduler.switchboard.lose_scheduler()
    assert kit.get("/health").status_code == 503


def test_ready_is_about_the_next_request() -> None:
    kit = Kit()
    assert kit.get("/ready").json == {"status": "ready"}
    kit.scheduler.stats = stats(ready=False, ranks=(RankStatus(0, 1, "loading"), RankStatus(1, 2, "ready")))
    loading = kit.get("/ready")
    assert loading.status_code == 503
    assert "rank 0 loading" in loading.json["reason"]
    kit.scheduler.stats = stats(draining=True)
    assert kit.get("/ready").status_code == 503


def test_a_scheduler_that_does_not_answer(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("shoal.frontend.health.QUERY_PATIENCE_S", 0.02)
    monkeypatch.setattr("shoal.frontend.metrics.QUERY_PATIENCE_S", 0.02)
    kit = Kit()
    kit.scheduler.stats = None
    assert kit.get("/health").status_code == 503
    assert kit.get("/ready").status_code == 503
    assert "shoal:up 0.0" in kit.get("/metrics").text


def test_metrics_are_prometheus_text() -> None:
    kit = Kit()
    kit.scheduler.stats = stats(
        ranks=(
            RankStatus(0, 1, "ready", device="cpu", level="avx2"),
            RankStatus(1, 2, "ready", device="cuda 1: NVIDIA H100", level="sm_90"),
            RankStatus(2, 0, "absent"),
        ),
        gauges={"num_requests_running": 3, 'memory_bytes{rank="0"}': 5, 'memory_bytes{rank="1"}': 7},
        counters={"steps_total": 9, 'request_success_total{finished_reason="stop"}': 2},
        histograms={"time_to_first_token_seconds": Histogram((0.1, 1.0), (4, 2, 1), 3.5)},
    )
    result = kit.get("/metrics")
    assert result.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(result.text)
        for sample in family.samples
    }
    assert samples["shoal:up",] == 1
    told = sorted(key for key in samples if key[0] == "shoal:rank_info")
    assert [key[1:] for key in told] == [("cpu", "avx2", "0"), ("cuda 1: NVIDIA H100", "sm_90", "1")]
    assert samples["shoal:num_requests_running",] == 3
    assert samples["shoal:memory_bytes", "1"] == 7
    assert samples["shoal:steps_total",] == 9
    assert samples["shoal:request_success_total", "stop"] == 2
    name = "shoal:time_to_first_token_seconds"
    assert [samples[f"{name}_bucket", bound] for bound in ("0.1", "1.0", "+Inf")] == [4, 6, 7]
    assert (samples[f"{name}_count",], samples[f"{name}_sum",]) == (7, 3.5)


def test_version() -> None:
    assert Kit().get("/version").json == {"version": __version__}


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/served/model"]
)
def test_head_is_get_without_the_body(path: str) -> None:
    kit = Kit()
    head = kit.request("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0
