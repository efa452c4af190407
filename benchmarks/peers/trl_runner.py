"""TRL's GRPOTrainer on the task of the comparison; runs in TRL's environment and leaves one JSON file.

python -m benchmarks.peers.trl_runner --model DIR --out FILE --steps 30 ...
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.trl_task import PROMPTS, prompt, vowel_share


def main() -> None:
    settings = _settings()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers
    import trl

    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="millrace-trl-") as directory:
        record = train(settings, directory)
    record["versions"] = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    record["threads"] = torch.get_num_threads()
    settings.out.write_text(json.dumps(record), encoding="utf-8")


def train(settings: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Train; returns for each step when it ended (``at``, and ``cpu``: seconds of this process) and what it held."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model)
    lengths: list[int] = []
    rewards: list[float] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        given = [vowel_share(ids) for ids in completion_ids]
        rewards.append(sum(given) / len(given))
        return given

    config = GRPOConfig(
        output_dir=directory,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.completions,
        num_generations=settings.completions,
        max_completion_length=settings.tokens,
        generation_kwargs={"min_new_tokens": settings.tokens},
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_iterations=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
    )
    clock = _clock_callback()
    GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [prompt(index) for index in range(PROMPTS)]}),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()
    return {"at": clock.at, "cpu": clock.cpu, "tokens": lengths, "rewards": rewards}


def _clock_callback() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []
            self.cpu: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.at.append(time.perf_counter())
            self.cpu.append(time.process_time())

    return Clock()


def _settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure TRL's GRPOTrainer.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    for name, default in (
        ("steps", 30),
        ("prompts", 8),
        ("completions", 8),
        ("tokens", 32),
        ("threads", 1),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
