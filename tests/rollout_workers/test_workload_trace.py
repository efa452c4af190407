"""The workload trace that a worker writes, and that it replays as what was recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from episode_doubles import make_context

from env_pool.workloads.replay import load_recording
from experience.entries import make_entry
from experience.records import Status
from experience.workload_trace import TraceHeader, WorkloadTraceWriter, read_workload
from rollout_workers.engines.protocol import FinishReason, TokenChunk
from rollout_workers.episode import Episode
from rollout_workers.loops import tool_agent
from rollout_workers.trajectory_builder import ROOM, TrajectoryBuilder
from rollout_workers.workload_writer import trace_episode


async def test_an_episode_as_a_line_of_the_trace(tokenizer_directory: Path, tmp_path: Path) -> None:
    context, *_ = make_context(tokenizer_directory, ["go blue ;", "done ;"], turns=2)
    times = iter(range(100))
    context.clock = lambda: float(next(times))
    context.member = 3
    await tool_agent(Episode(context))
    [trajectory] = [builder.build(Status.FINISHED, "", 0, 1.0, 0) for builder in context.builders]
    trajectory.reward = 1.0
    line = trace_episode(context, 7, make_entry([trajectory]), began_at=12.0)
    assert (line.index, line.member, line.arrived_at, line.reward, line.status) == (7, 3, 12.0, 1.0, "finished")
    assert line.prompt_tokens == 3
    assert line.reset_s > 0
    assert [(turn.output_tokens, turn.observation_tokens) for turn in line.turns] == [(3, 3), (2, 0)]
    assert all(turn.tool_s > 0 for turn in line.turns)
    assert line.versions == (0, 0)

    writer = WorkloadTraceWriter(tmp_path / "trace" / "worker-0.jsonl", TraceHeader())
    writer.write(line)
    writer.close()
    assert [episode for _, episode in read_workload(tmp_path / "trace")] == [line]
    script = load_recording(str(tmp_path / "trace")).script(0, 0)
    assert [turn.output_tokens for turn in script.turns] == [turn.output_tokens for turn in line.turns]
    assert [turn.tool_s for turn in script.turns] == [turn.tool_s for turn in line.turns]


def chunk(count: int, version: int) -> TokenChunk:
    return TokenChunk(
        request_id="r",
        tokens=np.arange(count, dtype=np.int32),
        logprobs=np.full(count, -0.5, np.float32),
        versions=np.full(count, version, np.int32),
        finish_reason=FinishReason.LENGTH,
    )


def test_a_trajectory_outgrows_its_first_room_and_leaves_prompts_as_they_were() -> None:
    builder = TrajectoryBuilder("e/0", "e", "g", "t")
    builder.append_context([7] * 10, "prompt", 0.0)
    first = builder.prompt()
    expected = [7] * 10
    for turn in range(40):
        builder.append_generation(chunk(ROOM // 4, turn), 0.0, 1.0)
        expected += range(ROOM // 4)
    assert first.tolist() == [7] * 10
    assert builder.tokens == expected
    assert builder.tail(3, before=1) == expected[-4:-1]
    child = builder.branch("e/1")
    child.append_generation(chunk(2, 50), 0.0, 1.0)
    assert (builder.sampled, child.sampled, child.generations) == (40 * (ROOM // 4), 2, 41)
    built = builder.build(Status.FINISHED, "", 0, 1.0, 0)
    assert built.sampled_tokens == builder.sampled
    assert built.versions[:10].tolist() == [-1] * 10
    assert built.versions[-1] == 39
    assert child.build(Status.FINISHED, "", 0, 1.0, 0).trainable.nonzero()[0].tolist() == [
        len(builder),
        len(builder) + 1,
    ]
