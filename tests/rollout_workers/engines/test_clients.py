from __future__ import annotations

from engine_helpers import request

from rollout_workers.engines.clients import ClientBook
from rollout_workers.engines.protocol import EngineHealth
from rollout_workers.submission import SubmitBatch


def batch(client: str, *names: str, releases: tuple[str, ...] = ()) -> SubmitBatch:
    requests = [request(f"{name}@0", session_id=name) for name in names]
    return SubmitBatch(client=client, requests=requests, releases=list(releases), aborts=[])


def test_sessions_count_from_their_first_request_until_they_are_released() -> None:
    book = ClientBook()
    book.took(batch("w0", "a", "b"))
    book.took(batch("w1", "c"))
    assert book.ended("a@0") == "w0"
    load = book.load("w0")
    assert (load.sessions, load.requests, load.own_sessions, load.own_requests, load.finished) == (3, 2, 2, 1, 1)
    book.took(batch("w0", "a", releases=("b",)))
    load = book.load("w1")
    assert (load.sessions, load.requests, load.own_sessions, load.own_requests) == (2, 3, 1, 1)
    assert (book.ended("b@0"), book.ended("b@0"), book.client_of("a@0")) == ("w0", None, "w0")
    book.took(batch("w0", releases=("a", "never seen")))
    assert book.load("w0").own_sessions == 0


def test_a_session_that_comes_back_in_the_batch_that_releases_it_counts_once() -> None:
    book = ClientBook()
    book.took(batch("w", "a"))
    book.took(batch("w", "a", releases=("a",)))
    assert book.load("w").sessions == 1


def test_what_the_engine_says_of_itself_is_passed_on() -> None:
    health = EngineHealth(version=3, waiting=4, kv_used=0.5, evicted_sessions=6)
    load = ClientBook().load("w", health)
    assert (load.waiting, load.kv_used, load.lost) == (4, 0.5, 6)


def test_a_client_that_is_gone_leaves_nothing() -> None:
    book = ClientBook()
    book.took(batch("w0", "a", "b"))
    book.took(batch("w1", "c"))
    book.ended("a@0")
    assert book.forget("w0") == (["b@0"], ["a", "b"])
    assert book.forget("w0") == ([], [])
    load = book.load("w0")
    assert (load.sessions, load.requests, load.own_sessions, load.own_requests) == (1, 1, 0, 0)
    assert book.ended("b@0") is None
