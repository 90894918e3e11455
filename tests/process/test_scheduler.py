"""The scheduler process with fake workers: what its clients see, whatever happens to whom."""

import os
import random
import signal
import subprocess
import sys
import time

import msgspec
import pytest
from fakes.deployment import Client, Deployment, deployed

from shoal.messages import PROTOCOL, Draining, Goodbye, Hello, Limits, Refused, Rejected
from shoal.wire import fingerprint, pack_ids


def prompt(length: int) -> list[int]:
    """Fresh random ids."""
    return [random.randrange(1000) for _ in range(length)]


def count_held(client: Client) -> float:
    """KV blocks that somebody holds."""
    return client.stats().gauges["kv_blocks_used"]


def running(deployment: Deployment, *, slow: bool = True) -> Client:
    """A client of a deployment that is up; slow steps leave time to interfere."""
    if slow:
        deployment.faults(delay_ms=10)
    client = deployment.client()
    client.wait_ready()
    return client


def test_requests_are_answered_exactly() -> None:
    with deployed() as deployment:
        client = running(deployment, slow=False)
        for number in range(1, 33):
            client.submit(number, prompt(random.randrange(1, 150)), random.randrange(1, 40))
        client.submit(33, prompt(20), 200, stop_ids=tuple(range(0, 1000, 9)))
        client.wait_ended(*range(1, 34))
        for number in range(1, 34):
            assert client.tokens[number] == client.expected(number)
            assert client.finished(number).reason == ("stop" if number == 33 else "length")
        assert client.finished(33).stop_id == client.tokens[33][-1]
        stats = client.stats()
        assert stats.gauges["kv_blocks_used"] == stats.gauges["num_requests_running"] == 0
        assert stats.gauges["mean_rows_per_step"] > 2
        assert stats.counters["generation_tokens_total"] == sum(len(ids) for ids in client.tokens.values())
        assert stats.counters['request_success_total{finished_reason="length"}'] == 32
        for name in ("time_to_first_token_seconds", "request_inference_time_seconds", "request_prompt_tokens"):
            assert sum(stats.histograms[name].counts) == 33
        generated = stats.histograms["request_generation_tokens"].total
        assert generated == stats.counters["generation_tokens_total"]
        assert stats.limits == Limits(512, 256, 8, 8)
        assert stats.stalled_ms == 0
        assert "id=test-33 reason=stop prompt=20" in deployment.log()


def test_a_shared_prompt_is_found_in_the_cache() -> None:
    with deployed() as deployment:
        client = running(deployment, slow=False)
        shared = prompt(100)
        for number in (1, 2):
            client.submit(number, shared, 5)
            client.wait_ended(number)
        assert [client.finished(number).cached_tokens for number in (1, 2)] == [0, 96]
        stats = client.stats()
        assert stats.counters["prefix_cache_queries_total"] == 200
        assert stats.counters["prefix_cache_hits_total"] == 96


def test_cancel_frees_at_once_running_or_queued() -> None:
    with deployed(instance_num=1) as deployment:
        client = running(deployment)
        client.submit(1, prompt(50), 400)
        client.submit(2, prompt(50), 400)
        client.wait_tokens(1, 3)
        for number in (2, 2, 1, 1, 77):
            client.cancel(number)
        client.wait_ended(1, 2, seconds=1)
        assert {client.finished(number).reason for number in (1, 2)} == {"cancelled"}
        assert 2 not in client.tokens
        assert count_held(client) == 0


def test_deadlines_hold_in_the_queue_and_while_running() -> None:
    with deployed(instance_num=1) as deployment:
        client = running(deployment)
        soon_ns = time.time_ns() + 300_000_000
        client.submit(1, prompt(10), 400, deadline_ns=soon_ns)
        client.submit(2, prompt(10), 400, deadline_ns=soon_ns)
        client.wait_ended(1, 2, seconds=1.5)
        assert {client.finished(number).reason for number in (1, 2)} == {"deadline"}
        assert client.tokens[1] == client.expected(1)[: len(client.tokens[1])] != []
        assert 2 not in client.tokens


def test_what_can_never_run_is_rejected_and_a_full_queue_says_when() -> None:
    with deployed(instance_num=1, max_queued_requests=2, max_queued_tokens=100) as deployment:
        client = running(deployment)
        client.submit(1, prompt(500), 13)
        client.submit(2, [5, -1], 5)
        client.wait_ended(1, 2)
        client.submit(3, prompt(60), 400)
        client.wait_tokens(3)
        for number in (4, 5, 6, 7):
            client.submit(number, prompt(45), 2)
        client.wait_ended(6, 7)
        codes = {number: end.code for number, end in client.ends.items() if isinstance(end, Rejected)}
        assert codes == {1: 400, 2: 400, 6: 429, 7: 429}
        overflow = client.ends[6]
        assert isinstance(overflow, Rejected)
        assert 1000 <= overflow.retry_ms <= 60_000
        client.submit(8, prompt(45), 2, attempt=1)
        client.cancel(3)
        client.wait_ended(4, 5, 8)
        assert client.tokens[8] == client.expected(8)


def test_a_late_short_request_overtakes_an_early_long_one() -> None:
    with deployed(max_prefill_token_num=16) as deployment:
        client = running(deployment)
        client.submit(1, prompt(400), 2)
        client.submit(2, prompt(300), 2)
        client.wait(lambda: client.stats().counters["steps_total"] >= 3)
        client.submit(3, prompt(6), 4)
        client.wait_ended(1, 2, 3)
        assert next(iter(client.ends)) == 3


def test_a_worker_dies_and_comes_back() -> None:
    with deployed(instance_num=2) as deployment:
        client = running(deployment)
        for number in (1, 2, 3):
            client.submit(number, prompt(30), 50)
        client.wait_tokens(2)
        deployment.workers[0].kill()
        client.wait_ready(False)
        client.submit(4, prompt(30), 5)
        deployment.workers[0].wait()
        deployment.start_worker()
        client.wait_ended(1, 2, 3, 4)
        for number in (1, 2, 3, 4):
            assert client.finished(number).reason == "length"
            assert client.tokens[number] == client.expected(number)
        assert client.ready
        counters = client.stats().counters
        assert (counters["crews_lost_total"], counters["requests_resumed_total"]) == (1, 2)


def test_one_of_two_ranks_dies_and_the_other_stays() -> None:
    with deployed(tp=2) as deployment:
        client = running(deployment)
        client.submit(1, prompt(30), 300)
        client.wait_tokens(1)
        survivor = deployment.workers[0].pid
        deployment.workers[1].kill()
        client.wait_ready(False)
        deployment.workers[1].wait()
        phases = {status.rank: status.phase for status in client.stats().ranks}
        assert phases[1] == "absent"
        deployment.start_worker(1)
        client.submit(2, prompt(30), 10)
        client.wait_ended(1, 2)
        assert client.tokens[1] == client.expected(1)
        assert client.tokens[2] == client.expected(2)
        status = client.stats().ranks
        assert [each.phase for each in status] == ["ready", "ready"]
        assert status[0].pid == survivor


def test_a_rank_that_dies_while_warming_up_does_not_block_the_start() -> None:
    with deployed(tp=2) as deployment:
        client = running(deployment, slow=False)
        for rank in (0, 1, 0):
            deployment.workers[rank].kill()
            deployment.workers[rank].wait()
            deployment.start_worker(rank)
        client.submit(1, prompt(30), 10)
        client.wait_ended(1)
        client.wait(lambda: client.stats().ready)
        client.submit(2, prompt(30), 10)
        client.wait_ended(2)
        assert client.tokens[2] == client.expected(2)


def test_workers_find_the_next_scheduler_and_requests_go_on() -> None:
    with deployed() as deployment:
        client = running(deployment)
        question = prompt(30)
        client.submit(1, question, 40)
        client.wait_tokens(1, 5)
        worker = deployment.workers[0].pid
        deployment.scheduler.kill()
        deployment.scheduler.wait()
        deployment.start_scheduler()
        after = deployment.client()
        assert after.scheduler != client.scheduler
        after.wait_ready()
        known = client.tokens[1]
        after.tokens[1] = list(known)
        after.submit(1, question, 40, generated=pack_ids(known), attempt=1)
        after.wait_ended(1)
        assert after.tokens[1] == after.expected(1)
        assert after.stats().ranks[0].pid == worker


def test_a_hung_worker_is_ended() -> None:
    with deployed(step_timeout_s=0.8) as deployment:
        client = running(deployment)
        client.submit(1, prompt(30), 300)
        client.wait_tokens(1)
        deployment.faults(hang_from_step=1)
        client.wait(lambda: client.stats().stalled_ms > 200)
        assert deployment.workers[0].wait(timeout=2) == -signal.SIGKILL
        deployment.faults()
        deployment.start_worker()
        client.submit(2, prompt(30), 5)
        client.wait_ended(1, 2)
        assert client.tokens[1] == client.expected(1)
        assert client.tokens[2] == client.expected(2)


def test_a_worker_that_hangs_while_warming_up_is_ended() -> None:
    with deployed(step_timeout_s=0.2) as deployment:
        client = running(deployment)
        deployment.faults(hang_at_warm_up=True)
        deployment.workers[0].kill()
        deployment.start_worker()
        assert deployment.workers[0].wait(timeout=5) == -signal.SIGKILL
        deployment.faults()
        deployment.start_worker()
        client.submit(1, prompt(30), 5)
        client.wait_ended(1)
        assert client.tokens[1] == client.expected(1)


def test_results_that_come_twice_are_dropped_and_counted() -> None:
    with deployed() as deployment:
        deployment.faults(twice_from_step=1)
        client = running(deployment, slow=False)
        for number in range(1, 9):
            client.submit(number, prompt(20), 20)
        client.wait_ended(*range(1, 9))
        assert all(client.tokens[number] == client.expected(number) for number in range(1, 9))
        assert client.stats().counters["stale_results_total"] >= 20


def test_results_out_of_order_cost_the_crew_but_no_answer_is_wrong() -> None:
    with deployed(step_timeout_s=0.5) as deployment:
        deployment.faults(late_step=4)
        client = running(deployment, slow=False)
        client.submit(1, prompt(20), 20)
        client.wait_ready(False)
        deployment.workers[0].wait()
        deployment.faults()
        deployment.start_worker()
        client.wait_ended(1)
        assert client.tokens[1] == client.expected(1)
        assert client.stats().counters["stale_results_total"] >= 1


def test_logits_that_are_not_finite_fail_their_own_request() -> None:
    with deployed() as deployment:
        deployment.faults(bad_seeds=(5,), bad_from_token=3)
        client = running(deployment, slow=False)
        shared = prompt(60)
        for number in range(1, 9):
            client.submit(number, shared, 20)
        client.wait_ended(*range(1, 9))
        assert client.finished(5).reason == "failed"
        assert "not finite" in client.finished(5).detail
        assert client.tokens[5] == client.expected(5)[:3]
        for number in (1, 2, 3, 4, 6, 7, 8):
            assert client.tokens[number] == client.expected(number)


def test_sigterm_drains() -> None:
    with deployed() as deployment:
        client = running(deployment)
        client.submit(1, prompt(30), 30)
        client.wait_tokens(1)
        deployment.scheduler.terminate()
        client.wait(lambda: any(isinstance(message, Draining) for message in client.heard))
        client.submit(2, prompt(30), 30)
        client.wait_ended(1, 2)
        assert client.tokens[1] == client.expected(1)
        refused = client.ends[2]
        assert isinstance(refused, Rejected)
        assert refused.code == 503
        assert deployment.scheduler.wait(timeout=3) == 0
        assert deployment.workers[0].wait(timeout=3) == 0


def test_a_drain_has_an_end_and_a_second_sigterm_does_not_wait_for_it() -> None:
    with deployed(drain_timeout_s=0.4) as deployment:
        client = running(deployment)
        client.submit(1, prompt(30), 400)
        client.wait_tokens(1)
        deployment.scheduler.terminate()
        client.wait_ended(1, seconds=2)
        assert client.finished(1).reason == "cancelled"
        assert deployment.scheduler.wait(timeout=3) == 0
    with deployed() as deployment:
        client = running(deployment)
        client.submit(1, prompt(30), 400)
        client.wait_tokens(1)
        deployment.scheduler.terminate()
        client.wait(lambda: any(isinstance(message, Draining) for message in client.heard))
        deployment.scheduler.terminate()
        assert deployment.scheduler.wait(timeout=2) == 128 + signal.SIGTERM


def test_a_frontend_that_goes_takes_its_requests_with_it() -> None:
    with deployed() as deployment, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as other:
        observer = running(deployment)
        dying = deployment.client(pid=other.pid)
        dying.submit(1, prompt(30), 400)
        dying.wait_tokens(1)
        leaving = deployment.client()
        leaving.submit(1, prompt(30), 400)
        leaving.wait_tokens(1)
        assert count_held(observer) > 0
        other.kill()
        leaving.send(Goodbye())
        observer.wait(lambda: count_held(observer) == 0, seconds=2)
        counters = observer.stats().counters
        assert counters['request_success_total{finished_reason="cancelled"}'] == 2


def test_a_frontend_that_cannot_be_reached_is_shed() -> None:
    with deployed() as deployment:
        client = running(deployment)
        gone = Client(deployment.run_dir)
        gone.connect()
        gone.submit(1, prompt(30), 400)
        gone.wait_tokens(1)
        gone.close()
        client.wait(lambda: count_held(client) == 0, seconds=2)
        client.submit(1, prompt(30), 10)
        client.wait_ended(1)
        assert client.tokens[1] == client.expected(1)


def test_strangers_liars_and_observers_get_nowhere() -> None:
    with deployed() as deployment:
        client = running(deployment, slow=False)
        other_version = deployment.client()
        other_version.hello(Hello(PROTOCOL, "0" * 16, other_version.boot_id, os.getpid()))
        other_version.wait(lambda: any(isinstance(each, Refused) for each in other_version.heard))
        refused = next(each for each in other_version.heard if isinstance(each, Refused))
        assert fingerprint() in refused.detail
        stranger = Client(deployment.run_dir)
        stranger.scheduler = client.scheduler
        stranger.submit(1, prompt(3), 3)
        stranger.send_raw(b"\x00" * 8 + msgspec.msgpack.encode(["Submit", "nonsense"]))
        stranger.send_raw(b"?")
        stranger.scheduler += 1
        stranger.submit(2, prompt(3), 3)
        observer = deployment.client("observer")
        observer.submit(3, prompt(3), 3)
        observer.wait(lambda: observer.stats().counters["messages_of_strangers_total"] == 2)
        counters = observer.stats().counters
        assert counters["messages_malformed_total"] == 2
        assert counters["messages_stale_total"] == 1
        assert observer.ready is None
        assert counters["steps_total"] == 0
        stranger.close()


def test_a_request_before_the_model_is_there_is_told_to_wait() -> None:
    with deployed(tp=2) as deployment:
        deployment.workers[1].kill()
        deployment.workers[1].wait()
        client = deployment.client()
        client.submit(1, prompt(3), 3)
        client.wait_ended(1)
        end = client.ends[1]
        assert isinstance(end, Rejected)
        assert end.code == 503
        deployment.start_worker(1)
        client.wait_ready()


@pytest.mark.parametrize("budget", [1, 3, 16])
def test_tiny_pools_preempt_and_still_answer_right(budget: int) -> None:
    with deployed(max_prefill_token_num=budget, session_len=96) as deployment:
        deployment.faults(num_blocks=14)
        for rank in deployment.workers:
            deployment.workers[rank].kill()
            deployment.workers[rank].wait()
            deployment.start_worker(rank)
        client = running(deployment, slow=False)
        deployment.faults(num_blocks=14)
        for number in range(1, 9):
            client.submit(number, prompt(random.randrange(1, 20)), random.randrange(50, 76))
        client.wait_ended(*range(1, 9))
        assert all(client.tokens[number] == client.expected(number) for number in range(1, 9))
        assert client.stats().counters["num_preemptions_total"] > 0
        assert count_held(client) == 0
