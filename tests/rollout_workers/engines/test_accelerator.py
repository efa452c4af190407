"""The synthetic accelerator: rates in closed form, order, KV, updates, and what never changes whatever is done to it."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rollout_workers.engines.synthetic.kv_cache as kv_cache
from experience.accounting import Cause
from rollout_workers.engines.synthetic.accelerator import Accelerator, Completion
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel


def cost(**changed: float) -> CostModel:
    plain = {
        "prefill_rate": 1e9,
        "decode_peak": 100.0,
        "half_concurrency": 4.0,
        "slots": 8,
        "kv_tokens": 1000,
        "update_pause_s": 0.0,
        "stage_s": 0.0,
    }
    return CostModel(**{**plain, **changed})  # type: ignore[arg-type]


def drain(accelerator: Accelerator) -> list[tuple[float, Completion]]:
    """Live from event to event until nothing is left; (time, completion)."""
    done = []
    while (at := accelerator.next_event()) is not None:
        done += [(at, completion) for completion in accelerator.advance(at)]
    return done


def test_docstring_examples() -> None:
    assert doctest.testmod(kv_cache).failed == 0


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_concurrent_sequences_decode_at_the_rate_of_the_law(concurrency: int) -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    for index in range(concurrency):
        accelerator.submit(f"r{index}", f"s{index}", 0, 50, 0.0)
    done = drain(accelerator)
    assert len(done) == concurrency
    throughput = concurrency * 50 / done[-1][0]
    assert throughput == pytest.approx(100.0 * concurrency / (concurrency + 4.0))


def test_unequal_sequences_share_the_accelerator_until_each_ends() -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    accelerator.submit("short", "a", 0, 10, 0.0)
    accelerator.submit("long", "b", 0, 30, 0.0)
    (first, _), (second, _) = drain(accelerator)
    assert first == pytest.approx(10 / (100 / 6))
    assert second == pytest.approx(first + 20 / (100 / 5))


def test_a_prompt_is_computed_before_decoding_goes_on_and_what_is_cached_is_not_computed() -> None:
    accelerator = Accelerator(cost(prefill_rate=100.0), 0, 0.0)
    accelerator.submit("turn1", "a", 50, 10, 0.0)
    ((at, _),) = drain(accelerator)
    assert at == pytest.approx(50 / 100 + 10 / 20)
    accelerator.submit("turn2", "a", 80, 10, 2.0)
    ((at, completion),) = drain(accelerator)
    assert completion.cached_tokens == 60
    assert at == pytest.approx(2.0 + 20 / 100 + 10 / 20)
    assert accelerator.seconds(at)[Cause.PREFILL] == pytest.approx(0.7)
    assert (accelerator.prefilled_tokens, accelerator.cached_tokens) == (70, 60)


def test_without_a_slot_requests_wait_in_the_order_of_their_arrival() -> None:
    accelerator = Accelerator(cost(slots=1), 0, 0.0)
    for name in "cab":
        accelerator.submit(name, name, 0, 10, 0.0)
    assert (accelerator.running, accelerator.waiting) == (1, 2)
    assert [completion.request_id for _, completion in drain(accelerator)] == ["c", "a", "b"]


def test_the_idle_session_that_waited_longest_is_evicted_and_prefills_again() -> None:
    accelerator = Accelerator(cost(kv_tokens=100), 0, 0.0)
    for name in ("old", "new"):
        accelerator.submit(name, name, 30, 10, accelerator.next_event() or 0.0)
        drain(accelerator)
    accelerator.submit("third", "third", 30, 10, 5.0)
    drain(accelerator)
    assert (accelerator.evicted_tokens, accelerator.kv.used) == (40, 80)
    accelerator.submit("new again", "new", 40, 5, 10.0)
    ((_, completion),) = drain(accelerator)
    assert completion.cached_tokens == 40
    accelerator.submit("old again", "old", 40, 5, 15.0)
    ((_, completion),) = drain(accelerator)
    assert completion.cached_tokens == 0


def test_a_request_waits_for_kv_that_running_ones_hold() -> None:
    accelerator = Accelerator(cost(kv_tokens=100), 0, 0.0)
    accelerator.submit("a", "a", 50, 10, 0.0)
    accelerator.submit("b", "b", 50, 10, 0.0)
    assert (accelerator.running, accelerator.waiting) == (1, 1)
    (first, _), (second, _) = drain(accelerator)
    assert second == pytest.approx(2 * first)


def test_an_update_marks_tokens_and_stops_the_accelerator() -> None:
    accelerator = Accelerator(cost(update_pause_s=1.0), 3, 0.0)
    accelerator.submit("r", "s", 0, 40, 0.0)
    accelerator.commit(4, 0.6)
    assert accelerator.partial("r") == [(3, 12)]
    ((at, completion),) = drain(accelerator)
    assert completion.segments == [(3, 12), (4, 28)]
    assert at == pytest.approx(40 / 20 + 1.0)
    assert accelerator.seconds(at)[Cause.WEIGHT_STALL] == pytest.approx(1.0)


def test_a_pinned_request_is_of_its_version_throughout() -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    accelerator.submit("r", "s", 0, 40, 0.0, pinned_version=0)
    accelerator.commit(1, 0.5)
    assert [completion.segments for _, completion in drain(accelerator)] == [[(0, 40)]]


def test_an_aborted_request_gives_what_it_has_and_its_room_back() -> None:
    accelerator = Accelerator(cost(slots=1), 0, 0.0)
    accelerator.submit("a", "a", 0, 100, 0.0)
    accelerator.submit("b", "b", 0, 10, 0.0)
    aborted = accelerator.abort("a", 1.0)
    assert aborted is not None
    assert aborted.segments == [(0, 20)]
    assert accelerator.abort("a", 1.0) is None
    ((at, _),) = drain(accelerator)
    assert at == pytest.approx(1.0 + 10 / 20)
    assert accelerator.generated_tokens == 30


def test_a_pause_keeps_requests_where_they_are() -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    accelerator.submit("a", "a", 0, 20, 0.0)
    accelerator.pause(0.5)
    assert accelerator.next_event() is None
    accelerator.resume(7.5)
    ((at, _),) = drain(accelerator)
    assert at == pytest.approx(8.0)


def test_what_cannot_be_is_refused() -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    accelerator.submit("a", "a", 0, 20, 0.0)
    with pytest.raises(ValueError, match="in flight already"):
        accelerator.submit("a", "a", 0, 20, 0.0)
    with pytest.raises(ValueError, match="an accelerator has 1000"):
        accelerator.submit("b", "b", 990, 20, 0.0)
    with pytest.raises(ValueError, match="0 output tokens"):
        accelerator.submit("b", "b", 10, 0, 0.0)


def test_the_cost_model_is_scaled_once() -> None:
    config = SyntheticEngineConfig(
        prefill_tokens_per_s=8000, decode_tokens_per_s=2000, kv_tokens=10_000, update_pause_s=1.0, stage_s=3.0
    )
    config.time_scale, config.token_scale = 10.0, 40.0
    scaled = CostModel.from_config(config)
    assert (scaled.prefill_rate, scaled.decode_peak, scaled.kv_tokens) == (2000.0, 500.0, 250.0)
    assert (scaled.update_pause_s, scaled.stage_s, scaled.slots) == (0.1, 0.3, config.slots)


actions = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "abort", "commit", "release", "pause", "resume", "pinned"]),
        st.integers(0, 5),
        st.integers(0, 60),
        st.integers(1, 40),
        st.floats(0.0, 1.5),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(actions=actions, slots=st.integers(1, 4), pause=st.sampled_from([0.0, 0.2]))
def test_tokens_and_seconds_are_conserved_whatever_happens(
    actions: list[tuple[str, int, int, int, float]], slots: int, pause: float
) -> None:
    accelerator = Accelerator(
        cost(slots=slots, prefill_rate=200.0, kv_tokens=150, update_pause_s=pause), 0, 0.0, "lane"
    )
    asked: dict[str, int] = {}
    ended: list[Completion] = []
    aborted: set[str] = set()
    now, version, busy = 0.0, 0, {}
    for number, (action, session, prompt, output, wait) in enumerate(actions):
        now += wait
        if action in ("submit", "pinned") and session not in busy:
            name = f"{session}-{number}"
            pinned = version if action == "pinned" else None
            accelerator.submit(name, str(session), prompt, output, now, pinned)
            asked[name], busy[session] = output, name
        elif action == "abort" and session in busy:
            completion = accelerator.abort(busy[session], now)
            if completion is not None:
                ended.append(completion)
                aborted.add(completion.request_id)
        elif action == "commit":
            version += 1
            accelerator.commit(version, now)
        elif action == "release" and session not in busy:
            accelerator.release(str(session), now)
        elif action in ("pause", "resume"):
            getattr(accelerator, action)(now)
        ended += accelerator.advance(now)
        busy = {key: name for key, name in busy.items() if all(name != completion.request_id for completion in ended)}
        assert accelerator.running <= slots
        assert 0 <= accelerator.kv.used <= 150
    accelerator.resume(now)
    ended += accelerator.advance(now)
    ended += [completion for _, completion in drain(accelerator)]
    assert sorted(completion.request_id for completion in ended) == sorted(asked)
    for completion in ended:
        made = sum(tokens for _, tokens in completion.segments)
        assert made <= asked[completion.request_id]
        if completion.request_id not in aborted:
            assert made == asked[completion.request_id]
        versions = [version for version, _ in completion.segments]
        assert versions == sorted(set(versions))
        assert all(tokens > 0 for _, tokens in completion.segments)
    assert accelerator.generated_tokens == sum(tokens for done in ended for _, tokens in done.segments)
    end = max(now, accelerator._now)
    assert sum(accelerator.seconds(end).values()) == pytest.approx(end)
    spans = accelerator.take_spans(end)
    assert sum(span.ended_at - span.began_at for span in spans) == pytest.approx(end)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    stops=st.lists(st.floats(0.01, 0.4), max_size=30),
)
def test_work_is_conserved_and_looking_often_changes_nothing(outputs: list[int], stops: list[float]) -> None:
    watched, left_alone = Accelerator(cost(slots=3), 0, 0.0), Accelerator(cost(slots=3), 0, 0.0)
    for index, output in enumerate(outputs):
        watched.submit(str(index), str(index), 0, output, 0.0)
        left_alone.submit(str(index), str(index), 0, output, 0.0)
    now, seen = 0.0, []
    for stop in stops:
        now += stop
        seen += [completion.request_id for completion in watched.advance(now)]
    seen += [completion.request_id for _, completion in drain(watched)]
    expected = drain(left_alone)
    assert seen == [completion.request_id for _, completion in expected]
    last = expected[-1][0]
    assert left_alone.seconds(last)[Cause.DECODE] == pytest.approx(last)
