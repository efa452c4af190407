from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from episode_doubles import TASK, make_context
from word_tokenizer import write_tokenizer

from env_pool.errors import SystemFault
from experience.records import NOT_SAMPLED, Status
from rollout_workers.chat import ChatTokenizer
from rollout_workers.episode import Episode
from rollout_workers.errors import ChatTemplateMissing, ContextFull, EpisodeError, HistoryRewritten
from rollout_workers.loops import tool_agent
from rollout_workers.step_log import RecordedSteps, Replay, StepLog, StepRecord


async def test_history_is_the_recorded_tokens_and_only_what_is_new_is_encoded(tokenizer_directory: Path) -> None:
    context, generator, provider, _ = make_context(tokenizer_directory, ["go blue ;", "done ;"])
    await tool_agent(Episode(context))
    chat = context.chat
    assert chat.decode(context.builders[0].tokens) == "ask look / go blue ; > red . done ;"
    assert chat.decode(generator.requests[1].prompt.tolist()) == "ask look / go blue ; > red ."
    assert provider.leases[0].actions == ["go blue", "done"]
    assert provider.leases[0].closed
    assert context.outcome == {"actions": ["go blue", "done"]}


async def test_only_sampled_tokens_are_trainable_and_carry_versions(tokenizer_directory: Path) -> None:
    context, generator, _, _ = make_context(tokenizer_directory, ["go ;", "done ;"])
    generator.version = 7
    await tool_agent(Episode(context))
    trajectory = context.builders[0].build(Status.FINISHED, "d", 1, 1.0, 0)
    sampled = [context.chat.decode([token]) for token in trajectory.tokens[trajectory.trainable]]
    assert sampled == ["go", ";", "done", ";"]
    assert set(trajectory.versions[trajectory.trainable]) == {7}
    assert set(trajectory.versions[~trajectory.trainable]) == {NOT_SAMPLED}
    assert [turn.role for turn in trajectory.turns] == ["prompt", "model", "observation", "model"]


async def test_a_turn_cut_by_its_budget_is_closed_by_the_template(tokenizer_directory: Path) -> None:
    context, _, _, _ = make_context(tokenizer_directory, ["go blue go", "done ;"])
    episode = Episode(context)
    episode.observe("look")
    assert (await episode.generate(max_tokens=2)).text == "go blue"
    episode.observe("red")
    await episode.generate()
    assert context.chat.decode(context.builders[0].tokens) == "ask look / go blue ; > red . done ;"


REWRITING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last %} {{ m.content | trim }} ;{% else %} no ;{% endif %}"
    "{% elif m.role == 'user' %}ask {{ m.content }} /{% else %} > {{ m.content }} .{% endif %}{% endfor %}"
)


async def test_a_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "rewriting", REWRITING)
    context, _, _, _ = make_context(directory, ["yes ;", "done ;"])
    with pytest.raises(HistoryRewritten, match=r"recorded 'yes ;'.*on_rewrite=fork"):
        await tool_agent(Episode(context))


async def test_or_opens_another_trajectory_when_asked_to_fork(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path / "rewriting", REWRITING)
    context, generator, _, _ = make_context(directory, ["yes ;", "done ;"], on_rewrite="fork")
    await tool_agent(Episode(context))
    first, second = (context.chat.decode(builder.tokens) for builder in context.builders)
    assert first == "ask look / yes ;"
    assert second == "ask look / no ; > red . done ;"
    assert context.rewrites == 1
    assert context.builders[1].sampled == 2
    assert generator.released == ["g/0/0#0"]


async def test_a_tokenizer_without_template_is_named(tmp_path: Path) -> None:
    context, _, _, _ = make_context(write_tokenizer(tmp_path / "plain", None), ["yes ;"])
    with pytest.raises(ChatTemplateMissing, match="has no chat template"):
        await tool_agent(Episode(context))


async def test_raw_text_needs_no_template(tmp_path: Path) -> None:
    context, _, _, _ = make_context(write_tokenizer(tmp_path / "plain", None), ["yes ;", "no ;"])
    episode = Episode(context)
    episode.observe_text("ask red")
    await episode.generate()
    episode.observe_text(" > blue")
    await episode.generate()
    assert context.chat.decode(context.builders[0].tokens) == "ask red yes ; > blue no ;"


async def test_the_episode_budget_cuts_turns_and_then_ends_the_episode(tokenizer_directory: Path) -> None:
    context, generator, _, _ = make_context(
        tokenizer_directory, ["go go go go", "go"], max_tokens=4, max_episode_tokens=6
    )
    episode = Episode(context)
    episode.observe("look")
    await episode.generate()
    assert generator.requests[0].max_tokens == 3
    episode.observe("red")
    with pytest.raises(ContextFull, match="max_episode_tokens=6"):
        await episode.generate()


async def test_generating_before_observing_is_an_error(tokenizer_directory: Path) -> None:
    context, _, _, _ = make_context(tokenizer_directory, ["go ;"])
    with pytest.raises(EpisodeError, match="no prompt"):
        await Episode(context).generate()


async def test_another_temperature_than_the_runs_is_refused(tokenizer_directory: Path) -> None:
    context, _, _, _ = make_context(tokenizer_directory, ["go ;"])
    episode = Episode(context)
    episode.observe("look")
    with pytest.raises(EpisodeError, match="one temperature"):
        await episode.generate(temperature=0.5)


async def test_forks_share_the_past_and_train_only_their_own_tokens(tokenizer_directory: Path) -> None:
    context, generator, _, _ = make_context(tokenizer_directory, ["go ;", "red ;", "blue ;"])
    episode = Episode(context)
    episode.observe("look")
    await episode.generate()
    branches = episode.fork(2)
    for branch in branches:
        branch.observe("red")
        await branch.generate()
    texts = [context.chat.decode(builder.tokens) for builder in context.builders]
    assert texts == ["ask look / go ;", "ask look / go ; > red . red ;", "ask look / go ; > red . blue ;"]
    assert [builder.sampled for builder in context.builders] == [2, 2, 2]
    assert {builder.parent for builder in context.builders[1:]} == {"g/0/0"}
    assert len({request.seed for request in generator.requests}) == 3


async def test_a_subagent_has_a_conversation_of_its_own_in_the_same_episode(tokenizer_directory: Path) -> None:
    context, _, _, _ = make_context(tokenizer_directory, ["yes ;"])
    child = Episode(context).subagent({"role": "user", "content": "blue"})
    await child.generate()
    assert context.chat.decode(context.builders[1].tokens) == "ask blue / yes ;"
    assert {builder.episode_id for builder in context.builders} == {"g/0"}


async def test_recorded_steps_are_not_done_again(tokenizer_directory: Path) -> None:
    context, _, _, records = make_context(tokenizer_directory, ["go ;", "done ;"])
    await tool_agent(Episode(context))
    whole = list(context.builders[0].tokens)
    for cut in range(len(records) + 1):
        rest = ["go ;", "done ;"][sum(record.call == "generate" for record in records[:cut]) :]
        again, generator, provider, _ = make_context(tokenizer_directory, rest, replay=Replay(deque(records[:cut])))
        await tool_agent(Episode(again))
        assert again.builders[0].tokens == whole
        assert again.outcome == context.outcome
        assert len(generator.requests) == len(rest)
        assert len(provider.leases) <= 1


async def test_an_environment_that_cannot_be_replayed_is_a_system_fault(tokenizer_directory: Path) -> None:
    context, _, _, records = make_context(tokenizer_directory, ["go ;", "done ;"])
    await tool_agent(Episode(context))
    again, _, _, _ = make_context(
        tokenizer_directory, ["done ;"], replay=Replay(deque(records[:2])), deterministic=False
    )
    with pytest.raises(SystemFault, match="not deterministic"):
        await tool_agent(Episode(again))


async def test_a_loop_that_is_not_deterministic_is_told_so(tokenizer_directory: Path) -> None:
    context, _, _, records = make_context(tokenizer_directory, ["go ;", "done ;"])
    await tool_agent(Episode(context))
    again, _, _, _ = make_context(tokenizer_directory, [], replay=Replay(deque(records)))
    async with Episode(again).environment() as environment:
        await environment.reset()
        with pytest.raises(EpisodeError, match="deterministic function"):
            await environment.step("something else")
        again.replay = Replay(deque(records[-1:]))


def test_the_step_log_survives_and_forgets_what_has_ended(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log", segment_records=2)
    for episode in ("a", "b", "c"):
        for index in range(2):
            log.append(
                StepRecord(episode_id=episode, attempt=0, trajectory_id=f"{episode}/0", call="step", action=str(index))
            )
        if episode != "c":
            log.ended(episode)
    recorded = RecordedSteps()
    recorded.read(tmp_path / "log")
    assert len(recorded.take("c")) == 2
    assert len(recorded.take("a")) == 0
    assert len(list((tmp_path / "log").iterdir())) == 2
    log.close()


def test_a_later_attempt_replaces_what_an_earlier_one_recorded(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log")
    for attempt, action in ((0, "old"), (1, "new"), (0, "late")):
        log.append(StepRecord(episode_id="a", attempt=attempt, trajectory_id="a/0", call="step", action=action))
    log.close()
    recorded = RecordedSteps()
    recorded.read(tmp_path / "log")
    replay = recorded.take("a")
    assert replay.attempt == 1
    step = replay.next_environment_call("a/0")
    assert step is not None
    assert step.action == "new"
    assert replay.next_environment_call("a/0") is None


def test_decoding_continues_the_text_before(tokenizer_directory: Path) -> None:
    chat = ChatTokenizer.load(tokenizer_directory)
    tokens = chat.encode("ask look / go ;")
    assert chat.decode(tokens[3:], after=tokens[:3]) == " go ;"
    assert np.array_equal(chat.encode(chat.decode(tokens)), tokens)
    assert TASK.environment == "counting"
