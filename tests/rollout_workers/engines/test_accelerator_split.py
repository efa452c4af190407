"""The synthetic accelerator where prompts share steps with decoding, or are computed for another accelerator."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rollout_workers.engines.synthetic.recorder as recorder_module
from experience.accounting import Cause
from rollout_workers.engines.synthetic.accelerator import Accelerator, Completion
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.recorder import Histogram, Recorder, TokenClock


def cost(**changed: float) -> CostModel:
    plain = {
        "prefill_rate": 1000.0,
        "decode_peak": 100.0,
        "half_concurrency": 4.0,
        "slots": 8,
        "kv_tokens": 1000,
        "update_pause_s": 0.0,
        "stage_s": 0.0,
    }
    return CostModel(**{**plain, **changed})  # type: ignore[arg-type]


def drain(accelerator: Accelerator) -> list[tuple[float, Completion]]:
    done = []
    while (at := accelerator.next_event()) is not None:
        done += [(at, completion) for completion in accelerator.advance(at)]
    return done


def test_docstring_examples() -> None:
    assert doctest.testmod(recorder_module).failed == 0


def test_a_prompt_in_the_steps_of_decoding_slows_it_and_does_not_stop_it() -> None:
    """Chunks of 50 tokens take 0.05 s, longer than reading the weights (0.04 s); each of c sequences adds 0.01 s."""
    accelerator = Accelerator(cost(prefill_chunk=50.0), 0, 0.0)
    accelerator.submit("a", "a", 0, 20, 0.0)
    accelerator.submit("b", "b", 100, 20, 0.2)
    (first, _), (second, _) = drain(accelerator)
    step_s = 0.05 + 0.01
    prompt_ends = 0.2 + 100 / 50 * step_s
    alone, together = 100 / 5, 100 / 6
    made = 0.2 * alone + (prompt_ends - 0.2) / step_s
    assert first == pytest.approx(prompt_ends + (20 - made) / together)
    assert second == pytest.approx(first + (made / alone))
    seconds = accelerator.seconds(second)
    assert sum(seconds.values()) == pytest.approx(second)
    assert seconds[Cause.PREFILL] == pytest.approx(2 * 0.05)


def test_a_sequence_may_end_while_the_prompt_of_another_is_computed() -> None:
    accelerator = Accelerator(cost(prefill_chunk=10.0), 0, 0.0)
    accelerator.submit("short", "a", 0, 2, 0.0)
    accelerator.submit("long", "b", 500, 1, 0.0)
    (first, one), (second, _) = drain(accelerator)
    assert one.request_id == "short"
    step_s = 0.04 + 0.01
    assert first == pytest.approx(2 * step_s)
    assert second == pytest.approx(first + (500 - 2 * 10) / 1000 + 1 / 20)


def test_small_chunks_cost_reading_the_weights_for_each_of_them() -> None:
    assert cost(prefill_chunk=10.0).shared_step(0).prefill_rate == pytest.approx(10 / 0.04)
    assert cost(prefill_chunk=100.0).shared_step(0).prefill_rate == pytest.approx(1000.0)


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 120), min_size=1, max_size=8),
    outputs=st.lists(st.integers(1, 30), min_size=8, max_size=8),
    chunk=st.sampled_from([0.0, 5.0, 40.0, 200.0]),
    stops=st.lists(st.floats(0.001, 0.3), max_size=20),
)
def test_tokens_and_seconds_are_conserved_however_often_one_looks(
    prompts: list[int], outputs: list[int], chunk: float, stops: list[float]
) -> None:
    watched = Accelerator(cost(slots=3, prefill_chunk=chunk), 0, 0.0, "lane", Recorder())
    left_alone = Accelerator(cost(slots=3, prefill_chunk=chunk), 0, 0.0)
    for index, prompt in enumerate(prompts):
        for accelerator in (watched, left_alone):
            accelerator.submit(str(index), str(index), prompt, outputs[index], 0.0)
    now, seen = 0.0, []
    for stop in stops:
        now += stop
        seen += [completion.request_id for completion in watched.advance(now)]
    seen += [completion.request_id for _, completion in drain(watched)]
    expected = drain(left_alone)
    assert sorted(seen) == sorted(completion.request_id for _, completion in expected)
    end = max(now, expected[-1][0])
    assert watched.generated_tokens == left_alone.generated_tokens == sum(outputs[: len(prompts)])
    for cause, seconds in left_alone.seconds(end).items():
        assert watched.seconds(end).get(cause, 0.0) == pytest.approx(seconds, abs=1e-6)
    assert sum(span.ended_at - span.began_at for span in watched.take_spans(end)) == pytest.approx(end)
    assert watched.recorder is not None
    assert watched.recorder.first_token.count == len(prompts)


def test_a_prompt_computed_for_another_accelerator_makes_no_token_and_stays_as_a_prefix() -> None:
    accelerator = Accelerator(cost(), 0, 0.0, recorder=(recorder := Recorder()))
    accelerator.prefill("turn1", "s", 200, 1.0, asked_at=0.5)
    ((at, done),) = drain(accelerator)
    assert (at, done) == (pytest.approx(1.2), Completion("turn1", [], 0))
    assert recorder.first_token.mean == pytest.approx(0.7)
    assert accelerator.kv.held("s") == 200
    accelerator.prefill("turn2", "s", 260, 2.0, asked_at=2.0)
    ((at, done),) = drain(accelerator)
    assert (at, done.cached_tokens) == (pytest.approx(2.06), 200)
    assert (accelerator.running, accelerator.waiting, accelerator.generated_tokens) == (0, 0, 0)
    assert accelerator.prefilled_tokens == 260


def test_what_was_delivered_is_not_computed() -> None:
    accelerator = Accelerator(cost(), 0, 0.0, recorder=(recorder := Recorder()))
    accelerator.submit("a", "s", 300, 10, 2.0, delivered=300, asked_at=1.9, begun=True)
    ((at, _),) = drain(accelerator)
    assert at == pytest.approx(2.0 + 10 / 20)
    assert (accelerator.prefilled_tokens, accelerator.received_tokens, accelerator.cached_tokens) == (0, 300, 0)
    assert recorder.first_token.count == 0
    assert recorder.inter_token.quantile(1.0) == pytest.approx(0.1, rel=0.02)
    accelerator.submit("b", "s", 330, 10, 5.0, delivered=320)
    ((at, _),) = drain(accelerator)
    assert at == pytest.approx(5.0 + 10 / 1000 + 10 / 20)
    assert accelerator.received_tokens == 310


def test_delivered_sequences_do_not_wait_for_prompts() -> None:
    accelerator = Accelerator(cost(prefill_chunk=50.0), 0, 0.0)
    accelerator.submit("prompt", "a", 900, 1, 0.0)
    accelerator.submit("delivered", "b", 90, 1, 0.1, delivered=90)
    (first, done), _ = drain(accelerator)
    assert done.request_id == "delivered"
    assert first == pytest.approx(0.1 + 0.05 + 0.01)


def test_a_prompt_for_another_accelerator_can_be_aborted() -> None:
    accelerator = Accelerator(cost(), 0, 0.0)
    accelerator.prefill("a", "s", 500, 0.0, asked_at=0.0)
    accelerator.prefill("b", "t", 100, 0.0, asked_at=0.0)
    assert accelerator.backlog_tokens == 600
    assert accelerator.abort("a", 0.2) == Completion("a", [], 0)
    assert accelerator.kv.held("s") == 200
    assert accelerator.prefilled_tokens == 300
    ((at, done),) = drain(accelerator)
    assert (at, done.request_id) == (pytest.approx(0.3), "b")
    with pytest.raises(ValueError, match="an accelerator has 1000"):
        accelerator.prefill("c", "u", 1001, 1.0, asked_at=1.0)


def test_times_between_tokens_are_those_of_the_law_and_of_what_holds_decoding_up() -> None:
    accelerator = Accelerator(cost(), 0, 0.0, recorder=(recorder := Recorder()))
    accelerator.submit("a", "a", 0, 40, 0.0)
    accelerator.submit("b", "b", 300, 1, 1.02)
    drain(accelerator)
    gaps = recorder.inter_token
    assert gaps.quantile(0.5) == pytest.approx(0.05, rel=0.02)
    assert gaps.quantile(1.0) == pytest.approx(0.3 + 0.05, rel=0.05)
    assert gaps.count == pytest.approx(41, abs=2)
    use = recorder.use
    assert use.seconds == pytest.approx(use.busy_s)
    assert use.kv_running == pytest.approx(40 * use.seconds + 301 * (0.3 + 1 / (100 / 6)), rel=0.01)


def test_a_clock_of_tokens_counts_every_token_once() -> None:
    recorder = Recorder()
    clock = TokenClock(recorder)
    for _ in range(10):
        clock.passed(0.135, 10.0, 2)
    assert recorder.inter_token.count == pytest.approx(2 * 13)
    assert recorder.inter_token.total_s == pytest.approx(2 * 1.3)
    clock.passed(0.04, 10.0, 2)
    clock.passed(1.0, 0.0, 2)
    clock.passed(0.05, 10.0, 3)
    assert recorder.inter_token.count == pytest.approx(2 * 14), "the third sequence did not wait for this token"
    assert recorder.inter_token.quantile(1.0) == pytest.approx(1.1, rel=0.02)


@given(values=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=50), share=st.floats(0.01, 1.0))
def test_quantiles_are_right_to_one_percent(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ranked = sorted(values)
    exact = next(value for place, value in enumerate(ranked, 1) if place >= share * len(ranked) * (1 - 1e-12))
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_what_was_added_since_is_a_histogram_again() -> None:
    recorder = Recorder()
    recorder.first_token.add(1.0)
    before = recorder.copy()
    recorder.first_token.add(5.0, 3.0)
    recorder.use.busy_s += 2.0
    since = recorder.since(before)
    assert since.first_token.quantile(0.01) == pytest.approx(5.0, rel=0.01)
    assert (since.first_token.count, since.use.busy_s) == (3.0, 2.0)


def test_moving_kv_is_scaled_like_everything_else() -> None:
    config = SyntheticEngineConfig(kv_bytes_per_token=1e6, kv_gb_per_s=10.0, prefill_chunk_tokens=400)
    config.time_scale, config.token_scale = 10.0, 40.0
    scaled = CostModel.from_config(config)
    assert scaled.kv_token_s == pytest.approx(1e-4 * 40 / 10)
    assert scaled.prefill_chunk == 10.0
    for name, value in (("kv_gb_per_s", 0.0), ("prefill_chunk_tokens", -1), ("kv_bytes_per_token", -1.0)):
        with pytest.raises(ValueError, match=f"engines.synthetic.{name}"):
            SyntheticEngineConfig(**{name: value}).validate()  # type: ignore[arg-type]
