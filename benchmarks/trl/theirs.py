"""TRL's side, run by the Python of its own environment: `python theirs.py SETTINGS.json` prints one JSON object.

GRPOTrainer as it is, with the optimizer and schedule of the other side handed in; two of its methods are timed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reward
from settings import SNAPSHOT, Clock, Settings

settings = Settings.read(sys.argv[1])
clock = Clock(settings.started)
os.environ["OMP_NUM_THREADS"] = str(settings.threads)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Timed(GRPOTrainer):
    """Counts what it generates and how long that takes."""

    first_prompts: list[list[int]]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "first_prompts"):
            self.first_prompts = [list(map(int, ids)) for ids in prompt_ids[:: settings.samples]]
        before = clock.enter("generation")
        out = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        clock.enter(before)
        sampled = sum(len(ids) for ids in out[0])
        clock.sampled_tokens += sampled
        clock.trained_tokens += sampled + sum(len(ids) for ids in prompt_ids)
        return out

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        before = clock.enter("rollout")
        out = super()._generate_and_score_completions(*args, **kwargs)
        clock.enter(before)
        return out


class Snapshots(TrainerCallback):
    """Tells the clock about updates, and writes the model for the evaluation afterwards."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock.enter("train")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock.update_done()
        if state.global_step % settings.snapshot_every == 0 or state.global_step == settings.updates:
            before = clock.enter(SNAPSHOT)
            folder = Path(settings.out) / f"update-{state.global_step:04d}"
            kwargs["model"].save_pretrained(folder)
            kwargs["processing_class"].save_pretrained(folder)
            clock.enter(before)


def rewarded(judge: Callable[[str, str], float]) -> Callable[..., list[float]]:
    """`judge` in the shape that GRPOTrainer calls."""

    def score(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        return [judge(turn[0]["content"], truth) for turn, truth in zip(completions, answer, strict=True)]

    return score


def config() -> GRPOConfig:
    """The same loss, sampling and batch as the other side's; what costs time and is not asked for is off."""
    return GRPOConfig(
        output_dir=f"{settings.out}/trainer",
        max_steps=settings.updates,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.groups * settings.samples // settings.micro_batch,
        num_generations=settings.samples,
        num_iterations=1,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=settings.clip,
        loss_type="dapo",  # divided by all tokens of the step, as `normaliser = "token"`
        scale_rewards="group",
        importance_sampling_level="token",
        mask_truncated_completions=False,
        max_grad_norm=settings.clip_grad,
        shuffle_dataset=False,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=False,
        dataloader_pin_memory=settings.device != "cpu",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    torch.set_num_threads(settings.threads)
    rows = [json.loads(line) for line in Path(settings.prompts).read_text(encoding="utf-8").splitlines()]
    asked = [{"prompt": [{"role": "user", "content": r["question"]}], "answer": r["answer"]} for r in rows]
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    if settings.device != "cpu":
        model.to(settings.device)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: settings.rate(update) / settings.lr)
    trainer = Timed(
        model=model,
        reward_funcs=rewarded(getattr(reward, settings.reward)),
        args=config(),
        train_dataset=Dataset.from_list(asked),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        callbacks=[Snapshots()],
        optimizers=(optimizer, schedule),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    names = ("trl", "torch", "transformers", "accelerate", "datasets")
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    result = clock.result(
        first_prompts=trainer.first_prompts,
        rewards=rewards,
        versions={name: importlib.metadata.version(name) for name in names},
        finished=time.time(),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
