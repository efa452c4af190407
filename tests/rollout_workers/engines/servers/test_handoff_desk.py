from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rollout_workers.engines.servers import desk as desk_module
from rollout_workers.engines.servers.desk import HandoffDesk, ServerHandoff, leave_note
from rollout_workers.engines.servers.errors import ServerUnreachable

HANDOFF = ServerHandoff(version=4, params={"remote_engine_id": "x", "remote_block_ids": [[1, 2]], "remote_port": 5601})


@pytest.fixture
async def desk() -> AsyncIterator[HandoffDesk]:
    opened = HandoffDesk()
    await opened.open("127.0.0.1")
    yield opened
    opened.close()


async def test_a_note_waits_for_its_request_and_is_given_once(desk: HandoffDesk) -> None:
    await asyncio.gather(*(leave_note(desk.address, f"w/{number}", HANDOFF, 20.0) for number in range(20)))
    assert desk.take("w/7") == HANDOFF
    assert desk.take("w/7") is None
    assert desk.take("w/8") == HANDOFF


async def test_notes_that_nobody_asks_for_are_forgotten(desk: HandoffDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_NOTES", 3)
    for number in range(5):
        await leave_note(desk.address, f"w/{number}", HANDOFF, 20.0)
    assert [desk.take(f"w/{number}") is not None for number in range(5)] == [False, False, True, True, True]


@pytest.mark.parametrize("garbage", [b"", b"\x05", b"\x04\0\0\0abcd", b"\xff\xff\xff\xffabc"])
async def test_garbage_is_not_taken_and_does_no_harm(desk: HandoffDesk, garbage: bytes) -> None:
    host, _, port = desk.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(garbage)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 20.0) == b""
    writer.close()
    await leave_note(desk.address, "w/1", HANDOFF, 20.0)
    assert desk.take("w/1") == HANDOFF


async def test_a_desk_that_is_gone_is_unreachable(desk: HandoffDesk) -> None:
    desk.close()
    with pytest.raises(ServerUnreachable, match="took no hand-off"):
        await leave_note(desk.address, "w/1", HANDOFF, 20.0)
    with pytest.raises(ServerUnreachable):
        await leave_note("nowhere", "w/1", HANDOFF, 20.0)


async def test_a_desk_that_never_answers_is_given_up() -> None:
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(5.0), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ServerUnreachable, match="took no hand-off"):
        await leave_note(f"127.0.0.1:{port}", "w/1", HANDOFF, 0.1)
    server.close()
