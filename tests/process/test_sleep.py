"""Sleep, aborts and quotas in the scheduler process, with fake workers and clients on the gateway's socket."""

import random

import pytest
from fakes.deployment import Client, Deployment, deployed

from shoal.config import ApiKey
from shoal.messages import Rejected


def prompt(length: int = 30) -> list[int]:
    """Fresh random ids."""
    return [random.randrange(1000) for _ in range(length)]


def serving(deployment: Deployment, *, slow: bool = True) -> Client:
    """A client of a deployment that is up; slow steps leave time to interfere."""
    if slow:
        deployment.faults(delay_ms=10)
    client = deployment.client()
    client.wait_ready()
    return client


def phases(client: Client) -> list[str]:
    return [status.phase for status in client.stats().ranks]


def refused(client: Client, number: int) -> Rejected:
    client.wait_ended(number)
    end = client.ends[number]
    assert isinstance(end, Rejected), end
    return end


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_what_runs_is_finished_and_what_comes_is_refused(level: int) -> None:
    with deployed(tp=2) as deployment:
        client = serving(deployment)
        client.submit(1, prompt(), 40)
        client.wait_tokens(1)
        asked = client.ask_to_rest(level)
        client.submit(2, prompt(), 5)
        assert refused(client, 2).reason == "asleep"
        assert not client.has_answer(asked)
        client.wait_ended(1)
        assert client.tokens[1] == client.expected(1)
        client.wait(lambda: client.has_answer(asked))
        stats = client.stats()
        assert (stats.asleep, stats.ready, stats.stalled_ms) == (level, False, 0)
        assert stats.gauges["asleep"] == level
        assert phases(client) == ["asleep", "asleep"]
        assert client.rest(0).asleep == 0
        client.submit(3, prompt(), 10)
        client.wait_ended(3)
        assert client.tokens[3] == client.expected(3)
        assert client.stats().counters["crews_lost_total"] == 0


def test_what_does_not_end_in_time_is_aborted_before_sleep() -> None:
    with deployed(instance_num=1, drain_timeout_s=0.3) as deployment:
        client = serving(deployment)
        client.submit(1, prompt(), 400)
        client.submit(2, prompt(), 400)
        client.wait_tokens(1)
        assert client.rest(1).asleep == 1
        assert {client.finished(number).reason for number in (1, 2)} == {"aborted"}
        assert client.tokens[1] == client.expected(1)[: len(client.tokens[1])]


def test_a_rank_that_dies_asleep_comes_back_asleep_and_wakes_with_the_other() -> None:
    with deployed(tp=2) as deployment:
        client = serving(deployment)
        client.rest(2)
        deployment.workers[1].kill()
        deployment.workers[1].wait()
        client.wait(lambda: phases(client) == ["asleep", "absent"])
        deployment.start_worker(1)
        client.wait(lambda: phases(client) == ["asleep", "asleep"])
        assert client.stats().asleep == 2
        client.rest(0)
        client.submit(1, prompt(), 10)
        client.wait_ended(1)
        assert client.tokens[1] == client.expected(1)


def test_a_rank_that_is_missing_is_waited_for_by_who_wakes_the_model() -> None:
    with deployed(tp=2) as deployment:
        client = serving(deployment)
        client.rest(1)
        deployment.workers[0].kill()
        deployment.workers[0].wait()
        client.wait(lambda: phases(client)[0] == "absent")
        asked = client.ask_to_rest(0)
        client.wait(lambda: phases(client)[1] == "loaded")
        assert not client.has_answer(asked)
        deployment.start_worker(0)
        client.wait(lambda: client.has_answer(asked))
        assert client.stats().ready


def test_deeper_sleep_and_back_without_waking_between() -> None:
    with deployed() as deployment:
        client = serving(deployment)
        assert client.rest(1).asleep == 1
        assert client.rest(2).asleep == 2
        assert client.rest(1).asleep == 2
        assert client.rest(0).asleep == 0
        assert client.rest(0).asleep == 0


def test_who_is_woken_before_it_sleeps_goes_on() -> None:
    with deployed() as deployment:
        client, other = serving(deployment), deployment.client()
        client.submit(1, prompt(), 400)
        client.wait_tokens(1)
        asked = client.ask_to_rest(1)
        other.wait_ready(False)  # what comes over two sockets may come in another order
        assert other.rest(0).asleep == 0
        client.wait(lambda: client.has_answer(asked))
        client.submit(2, prompt(), 5)
        client.wait_ended(1, 2)
        assert [client.tokens[number] for number in (1, 2)] == [client.expected(number) for number in (1, 2)]


def test_sleep_that_is_asked_for_while_loading_comes_after_it() -> None:
    with deployed(tp=2) as deployment:
        client = serving(deployment)
        deployment.workers[1].kill()
        deployment.workers[1].wait()
        client.wait_ready(False)
        asked = client.ask_to_rest(1)
        client.wait(lambda: phases(client)[0] == "loaded")
        assert not client.has_answer(asked)
        deployment.start_worker(1)
        client.wait(lambda: client.has_answer(asked))
        assert client.stats().asleep == 1


def test_a_rank_that_hangs_on_its_way_to_sleep_is_ended() -> None:
    with deployed(step_timeout_s=0.2) as deployment:
        client = serving(deployment)
        deployment.faults(hang_at_sleep=True)
        asked = client.ask_to_rest(1)
        deployment.workers[0].wait(timeout=10)
        deployment.faults()
        deployment.start_worker()
        client.wait(lambda: client.has_answer(asked))
        client.wait(lambda: phases(client) == ["asleep"])
        assert client.rest(0).ready


def test_a_sleeping_server_drains_at_once() -> None:
    with deployed() as deployment:
        client = serving(deployment)
        client.rest(1)
        deployment.scheduler.terminate()
        assert deployment.scheduler.wait(timeout=10) == 0
        assert deployment.workers[0].wait(timeout=10) == 0


def test_an_abort_reaches_requests_of_every_frontend() -> None:
    with deployed(instance_num=1) as deployment:
        client, other = serving(deployment), deployment.client()
        client.submit(1, prompt(), 300, tenant="a")
        client.submit(2, prompt(), 300, tenant="b", group=1)
        client.wait_tokens(1)
        found = client.survey().requests
        assert [(each.label, each.running, each.waiting) for each in found] == [("test-1", 1, 1)]
        assert other.abort("test-1", "c") == 0
        assert other.abort("test-1", "a") == 1
        client.wait_ended(1)
        assert client.finished(1).reason == "aborted"
        assert client.tokens[1] == client.expected(1)[: len(client.tokens[1])]
        client.wait_tokens(2)
        assert other.abort() == 1
        client.wait_ended(2)
        assert client.survey().requests == ()
        assert client.stats().counters['request_success_total{finished_reason="aborted"}'] == 2


def test_quotas_hold_over_several_frontends() -> None:
    keys = (ApiKey(name="a", digest="", max_concurrent=2), ApiKey(name="b", digest="", requests_per_minute=1))
    with deployed(api_keys=keys, max_concurrent_requests=4) as deployment:
        clients = [serving(deployment), deployment.client()]
        for client in clients:
            client.submit(1, prompt(), 400, tenant="a")
            client.wait_tokens(1)
        clients[0].submit(2, prompt(), 5, tenant="a")
        assert refused(clients[0], 2).reason == "concurrency"
        clients[0].submit(3, prompt(), 400, tenant="b")
        clients[0].wait_tokens(3)  # what comes over two sockets may come in another order
        clients[1].submit(3, prompt(), 5, tenant="b")
        rate = refused(clients[1], 3)
        assert rate.reason == "request_rate"
        assert 50_000 < rate.retry_ms <= 60_000
        clients[1].submit(4, prompt(), 400)
        clients[1].submit(5, prompt(), 5)
        assert "4 requests are open" in refused(clients[1], 5).detail
        counters = clients[0].stats().counters
        assert counters['request_rejected_total{reason="concurrency"}'] == 2
        assert counters['tenant_tokens_total{tenant="a",kind="prompt"}'] == 60
        clients[1].close()
        clients[0].wait(lambda: clients[0].stats().gauges["num_http_requests"] == 2)


def test_times_are_told_at_the_end() -> None:
    with deployed(instance_num=1) as deployment:
        client = serving(deployment)
        client.submit(1, prompt(), 20)
        client.submit(2, prompt(), 20)
        client.wait_ended(1, 2)
        first, second = client.finished(1), client.finished(2)
        for end in (first, second):
            assert end.prefill_us >= 10_000
            assert end.decode_us >= 19 * 10_000
        assert second.queue_us >= first.prefill_us + first.decode_us
