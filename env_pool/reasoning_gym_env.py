"""Single-turn tasks of any reasoning-gym family, judged by the family's own verifier.

``tasks.options.family`` names the family (``chain_sum``); every other option is passed to it (``max_terms: 4``), but
for ``answer_from`` and ``instruction`` below. The split is made on the question itself: it is held out when the hash
of its text says so, so no question is in both splits, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any, ClassVar

import msgspec

from env_pool.environment import Environment, Observation, Split, StepResult, VerifierResult
from env_pool.tools import nearest
from experience.records import Task

BLOCK = 500
"""Questions taken from one data set before the next one is made: some families make all of theirs at once."""
HELD_OUT_SHARE = 10
"""One in this many questions is held out."""
MAX_ATTEMPTS = 500

ANSWER_SOURCES = ("auto", "boxed", "tag", "last_line", "all")

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINKING = re.compile(r"^.*</think>", re.DOTALL)
_LABEL = re.compile(r"^(?:final\s+)?answer\s*(?::|=|\bis\b)\s*", re.IGNORECASE)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % HELD_OUT_SHARE == 0


def extract_answer(text: str, source: str = "auto") -> str:
    r"""The answer in what a model wrote.

    ``boxed``: the last ``\boxed{}``; ``tag``: the last ``<answer>``; ``last_line``; ``all``: the whole text; ``auto``:
    the first of the first three that is there. Empty when there is none. Pure string work: safe on any thread.
    """
    text = _THINKING.sub("", text).strip()
    if source == "all":
        return text
    if source in ("auto", "boxed") and (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    if source in ("auto", "tag") and (tags := _TAG.findall(text)):
        return str(tags[-1]).strip()
    if source in ("auto", "last_line") and text:
        return _LABEL.sub("", text.splitlines()[-1].strip()).strip()
    return ""


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


class ReasoningGymEnvironment(Environment):
    """One question, one answer."""

    name: ClassVar[str] = "reasoning_gym"
    deterministic: ClassVar[bool] = True
    default_options: ClassVar[Mapping[str, Any]] = {"family": "chain_sum", "answer_from": "auto", "instruction": ""}

    def __init__(self) -> None:
        self._text = ""

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        own = {key: options.get(key, default) for key, default in cls.default_options.items()}
        if own["answer_from"] not in ANSWER_SOURCES:
            raise ValueError(f"tasks.options.answer_from must be one of {ANSWER_SOURCES}, got {own['answer_from']!r}")
        settings = {key: value for key, value in options.items() if key not in cls.default_options}
        family, frozen = str(own["family"]), msgspec.json.encode(settings, order="sorted")
        check_family(family, settings)
        for attempt in range(MAX_ATTEMPTS):
            data_seed = _data_seed(family, seed, split, index // BLOCK, attempt)
            question = _entry(family, frozen, data_seed, index % BLOCK)["question"]
            if is_held_out(question) == (split == "held_out"):
                break
        else:
            raise ValueError(f"reasoning_gym family {family!r} has too few different questions for a {split} split")
        payload = {
            "question": f"{question}\n\n{own['instruction']}" if own["instruction"] else question,
            "family": family,
            "settings": frozen.decode(),
            "data_seed": data_seed,
            "position": index % BLOCK,
            "answer_from": own["answer_from"],
        }
        return Task(task_id=f"{family}/{split}/{seed}/{index}", environment=cls.name, payload=payload, domain=family)

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        made = task.payload
        frozen = made["settings"].encode()
        answer = extract_answer(outcome["text"], made["answer_from"])
        entry = _entry(made["family"], frozen, made["data_seed"], made["position"])
        score = float(_data_set(made["family"], frozen, made["data_seed"]).score_answer(answer, entry))
        return VerifierResult(reward=score)

    def reset(self, task: Task) -> Observation:
        return Observation(messages=[{"role": "user", "content": task.payload["question"]}])

    def step(self, action: str) -> StepResult:
        self._text = action
        return StepResult(done=True)

    def outcome(self) -> dict[str, Any]:
        return {"text": self._text}


def check_family(family: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError when there is no such family, or when it does not take these settings."""
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise ValueError(
            f"tasks.options.family: reasoning-gym has no family {family!r} among its {len(DATASETS)}."
            f"{nearest(family, DATASETS)}"
        )
    known = [name for name in signature(DATASETS[family][1]).parameters if name not in ("seed", "size")]
    for key in settings:
        if key not in known:
            raise ValueError(f"tasks.options.{key}: family {family!r} takes {', '.join(known)}.{nearest(key, known)}")


def _data_seed(family: str, seed: int, split: Split, block: int, attempt: int) -> int:
    digest = hashlib.sha256(f"{family}/{seed}/{split}/{block}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


@lru_cache(maxsize=64)
def _data_set(family: str, settings: bytes, data_seed: int) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, seed=data_seed, size=BLOCK, **msgspec.json.decode(settings))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"tasks.options: reasoning-gym family {family!r} refuses its settings: {error}") from error


@lru_cache(maxsize=1024)
def _entry(family: str, settings: bytes, data_seed: int, position: int) -> dict[str, Any]:
    entry: dict[str, Any] = _data_set(family, settings, data_seed)[position]
    return entry
