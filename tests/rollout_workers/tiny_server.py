"""A server of a few lines for the tests of the shell: it counts instead of sampling, and misbehaves when asked to.

``python tiny_server.py PORT [--version 1.0] [--core]``; with ``--core`` there is a process below it. The token at position p of a sequence that begins with
token t is ``t + p``. Routes: /ready /identity /generate /abort /pause /resume /stage /commit /served /metrics, and
/misbehave {"path", "how", "times"} with how = "500" | "400" | "garbage" | "cut" | "silence" | "close".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from typing import Any

GAP_S = 0.002
CORE = [sys.executable, "-c", "import time; time.sleep(3600)", "tiny::core"]


class State:
    def __init__(self) -> None:
        self.version = 0
        self.staged = -1
        self.polls = 0
        self.misdeeds: list[dict[str, Any]] = []
        self.aborted: set[str] = set()
        self.running: set[str] = set()
        self.seen: list[dict[str, Any]] = []
        self.go = asyncio.Event()
        self.go.set()


async def serve(port: int, version: str, max_len: int) -> None:
    state = State()

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await answer(reader, writer, state, version, max_len):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(on_client, "127.0.0.1", port)
    await server.serve_forever()


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: State, version: str, max_len: int
) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    _method, path, _ = head.split(" ", 2)
    size = next(
        (int(line.split(":")[1]) for line in head.lower().split("\r\n") if line.startswith("content-length")), 0
    )
    body = json.loads(await reader.readexactly(size)) if size else {}
    state.seen.append({**body, "path": path})
    misdeed = next((each for each in state.misdeeds if each["path"] == path), None)
    if misdeed is not None:
        misdeed["times"] -= 1
        if misdeed["times"] == 0:
            state.misdeeds.remove(misdeed)
        if misdeed["how"] == "silence":
            await asyncio.sleep(3600)
        if misdeed["how"] == "close":
            return False
        if misdeed["how"] in ("500", "400"):
            return await reply(writer, int(misdeed["how"]), b"as it was told to")
        if misdeed["how"] == "garbage":
            return await reply(writer, 200, b"<html>no</html>")
    if path == "/generate":
        return await generate(writer, state, body, cut=misdeed is not None)
    answered = control(path, state, body, version, max_len)
    return await reply(writer, 404 if answered is None else 200, json.dumps(answered).encode())


def control(path: str, state: State, body: dict[str, Any], version: str, max_len: int) -> Any:
    """What is answered; None: there is no such path."""
    match path:
        case "/ready":
            pass
        case "/identity":
            return {"version": version, "max_len": max_len}
        case "/misbehave":
            state.misdeeds.append(body)
        case "/abort":
            state.aborted.add(body["id"])
        case "/pause":
            state.go.clear()
        case "/resume":
            state.go.set()
        case "/stage":
            if body["version"] != state.staged:
                state.polls = 3
                state.staged = body["version"]
            state.polls -= 1
            return {"ok": True, "pending": state.polls > 0}
        case "/adopt":
            state.version = body["version"]
        case "/commit":
            if state.go.is_set() or body["version"] != state.staged:
                return {"ok": False, "why": "not paused, or not staged"}
            state.version = body["version"]
        case "/served":
            return {"version": state.version}
        case "/seen":
            return state.seen
        case "/metrics":
            return {"running": len(state.running)}
        case _:
            return None
    return {"ok": True}


async def generate(writer: asyncio.StreamWriter, state: State, body: dict[str, Any], cut: bool) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()
    name, prompt = body["id"], body["prompt"]
    state.running.add(name)
    try:
        for number in range(body["max_tokens"]):
            await asyncio.sleep(body.get("gap_s", GAP_S))
            await state.go.wait()
            token = prompt[0] + len(prompt) + number
            finish = "length" if number + 1 == body["max_tokens"] else None
            if name in state.aborted:
                await chunk(writer, {"token": None, "version": state.version, "finish": "abort"})
                break
            if cut and number == 3:
                return False
            await chunk(writer, {"token": token, "version": state.version, "finish": finish})
    finally:
        state.running.discard(name)
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


async def chunk(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = json.dumps(event).encode() + b"\n"
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def reply(writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--core", action="store_true")
    chosen = parser.parse_args()
    core = subprocess.Popen(CORE) if chosen.core else None
    print(f"tiny server {os.getpid()} on {chosen.port}", flush=True)
    asyncio.run(serve(chosen.port, chosen.version, chosen.max_len))
