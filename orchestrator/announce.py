"""What a command says before the live view takes over: lines that stay, and what it is doing at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Update = Callable[[str], None]


class Announcer:
    """Speaks to a terminal with a spinner, and to a file or a log in plain lines, at most one every ``plain_every_s``."""

    def __init__(self, console: Console, *, plain_every_s: float = 10.0) -> None:
        self._console = console
        self._plain_every_s = plain_every_s

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def doing(self, text: str) -> Iterator[Update]:
        """Show ``text`` while the block runs; the function that is yielded replaces it."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with self._console.status(text) as status:
                yield lambda update: status.update(update)
            return
        self.say(text)
        said_at = time.monotonic()

        def update(text: str) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= self._plain_every_s:
                said_at = time.monotonic()
                self.say(text)

        yield update
