"""How Millrace and its plugin in SGLang's scheduler talk. Imported on both sides, so by msgspec alone.

SGLang has two ways into its scheduler process that carry text of Millrace's own: the name in ``/get_weights_by_name``
(answered with a list of numbers) and the name of a tensor in ``/update_weights_from_tensor``. Commands travel as names,
and an answer as the numbers of its bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Literal

import msgspec

PREFIX = "millrace:"

MODEL_PATH = "MILLRACE_MODEL_PATH"
"""Environment variable of the server: the directory whose tensors an offered version must have, name for name."""


class Command(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the plugin shall do.

    ``attach``: let itself be asked. ``stage``: fetch ``offer`` as ``member`` in the background. ``state``: say how far
    that is. ``expect``: say so if ``version`` is not staged. ``commit``: load the staged ``version`` into the model.
    """

    kind: Literal["attach", "stage", "state", "expect", "commit"]
    offer: bytes = b""
    member: str = ""
    version: int = -1


class PluginState(msgspec.Struct, frozen=True, kw_only=True):
    """How far the plugin is. ``version``: the one being staged, or staged; -1: none."""

    version: int = -1
    staging: bool = False
    error: str = ""


class _Answer(msgspec.Struct):
    parameter: list[float]


_COMMAND = msgspec.json.Decoder(Command)
_STATE = msgspec.json.Decoder(PluginState)
_ANSWER = msgspec.json.Decoder(_Answer | list[float])


def encode_command(command: Command) -> str:
    """A command as the name of a tensor."""
    return PREFIX + base64.b64encode(msgspec.json.encode(command)).decode()


def is_command(name: str) -> bool:
    return name.startswith(PREFIX)


def decode_command(name: str) -> Command:
    """Raises ValueError for any other name."""
    if not is_command(name):
        raise ValueError(f"{name[:60]!r} is no command of Millrace's")
    try:
        return _COMMAND.decode(base64.b64decode(name[len(PREFIX) :], validate=True))
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"not a command of Millrace's: {error}") from None


def encode_state(state: PluginState) -> list[float]:
    """An answer as the list of numbers that SGLang passes on."""
    return [float(byte) for byte in msgspec.json.encode(state)]


def decode_reply(body: bytes) -> PluginState:
    """The plugin's state out of the answer of ``/get_weights_by_name``. Raises ValueError for anything else."""
    try:
        answer = _ANSWER.decode(body)
        numbers = answer if isinstance(answer, list) else answer.parameter
        return decode_state(numbers)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an answer of Millrace's plugin ({error})") from None


def decode_state(numbers: Sequence[float]) -> PluginState:
    """Raises ValueError if these are not the numbers of a state."""
    try:
        return _STATE.decode(bytes(int(number) for number in numbers))
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ValueError(f"not an answer of Millrace's plugin ({error})") from None


def carrier(command: Command) -> str:
    """What ``serialized_named_tensors`` holds for one rank: the command as the name of an empty tensor.

    The pickle of ``[(name, torch.FloatTensor())]`` is written out, so that the sender needs no torch. SGLang unpickles
    containers of data only, of which the tensor types are some.
    """
    name = encode_command(command).encode()
    pickled = b"".join(
        [
            b"\x80\x02](",  # protocol 2, an empty list, mark
            b"X" + struct.pack("<I", len(name)) + name,
            b"ctorch\nFloatTensor\n)R",  # torch.FloatTensor()
            b"\x86e.",  # the pair of both, appended; end
        ]
    )
    return base64.b64encode(pickled).decode()
