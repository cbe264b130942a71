"""Recipes with Megatron as the trainer: the demo wherever it may run, phases before RL, teachers, engines of SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.integration.megatron_rig import small
from tests.integration.sglang_server import running_sglang
from tests.integration.test_colocate import logged
from tests.integration.test_export import tensors
from tests.integration.test_megatron_runs import measured, recipe
from tests.integration.test_ranks_run import phases
from tests.tiny import merge

from sluice import cli
from sluice.config import RunConfig
from sluice.errors import ConfigError
from sluice.log import ACCOUNTED, LogReader, account
from sluice.models.smollm2 import fetch
from sluice.obs.metrics import read_metrics
from sluice.obs.view import NullView
from sluice.orchestrate import api

pytestmark = [pytest.mark.timeout(580), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("model") / "small")


def same(ours: RunConfig, theirs: RunConfig, tolerance: float = 1e-5) -> None:
    """The same tokens, and the same figures but for rounding."""
    first, second = logged(ours), logged(theirs)
    assert {key: found[0] for key, found in first.items()} == {key: found[0] for key, found in second.items()}
    for mine, other in zip(measured(ours), measured(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            least = 1e-5 if name.startswith("mismatch/") else 1e-6
            np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=least, err_msg=name)


def demo(folder: Path, *words: str) -> RunConfig:
    """The demo by its command, shortened, and its resolved config."""
    short = (
        f"runs_dir={folder}", "warm_start.steps=20", f"steps={STEPS}", "groups_per_step=4", "data.train.size=400",
        "data.eval_prompts=8", "obs.live=false", "train.optimizer.eps=1e-4", 'rewards=[{type="random"}]',
    )  # fmt: skip
    # So short an SFT answers nothing rightly: a coin by episode id gives each batch a gradient.
    assert cli.run(["train", str(ROOT / "recipes/demo.py"), *short, *words]) == 0
    return RunConfig.model_validate_json((folder / "demo" / "config.json").read_text())


def test_the_demo_with_another_trainer_wherever_it_runs(tmp_path: Path) -> None:
    """`--trainer megatron` is all that differs: in one process, on Ray, and by turns, SFT before it."""
    theirs = demo(tmp_path / "torch")
    places: dict[str, tuple[str, ...]] = {
        "inline": (), "ray": ("placement.runtime=ray",), "colocated": ("--colocate",),
        "colocated on ray": ("--colocate", "placement.runtime=ray"),
    }  # fmt: skip
    for name, words in places.items():
        ours = demo(tmp_path / name, "--trainer", "megatron", *words)
        assert ours.train.backend == "megatron"
        rows = read_metrics(ours.folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["train/grad_norm"] > 0 for row in rows)
        assert ("time/switch" in rows[0]) == ("--colocate" in words)
        assert account(LogReader(ours.folder / "log").read(kinds=ACCOUNTED)).complete
        same(ours, theirs)


def test_phases_before_rl(tmp_path: Path, model: Path) -> None:
    """SFT and DPO by Megatron, in a pipeline and over tensors, and GRPO after them, against torch."""
    runs: list[RunConfig] = []
    for name in ("torch", "megatron"):
        asked = phases(tmp_path / name, 1)
        slow = {"optimizer": {"lr": 3e-3, "eps": 1e-4}}
        chosen = {"backend": "megatron", "ranks": 2}
        for phase, layout in (("warm_start", {"pp": 2}), ("preferences", {"tp": 2})):
            here = {**slow, **chosen, "megatron": layout} if name == "megatron" else slow
            asked = merge(asked, {phase: {"train": here}})
        train = {**chosen, "megatron": {"cp": 2}} if name == "megatron" else {}
        runs.append(recipe(tmp_path / name, model, steps=STEPS, train=train, **asked))
        api.train(runs[-1], view=NullView())
    theirs, ours = runs
    for name in ("model-sft", "model-dpo"):
        mine, other = (tensors(config.folder / name) for config in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, tensor in other.items():
            np.testing.assert_allclose(mine[key].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-5, err_msg=key)
    same(ours, theirs, 1e-4)


def distilled(folder: Path, model: Path, teacher: Path, train: dict[str, Any]) -> RunConfig:
    return recipe(
        folder, model, steps=STEPS, train=train, algorithm={"type": "opd", "teacher": "big", "kl": None},
        teachers=[{"name": "big", "path": str(teacher)}],
    )  # fmt: skip


def sharpened(folder: Path) -> Path:
    """The model of `folder` with matrices three times as large: it is surer of what comes next."""
    file = folder / "model.safetensors"
    weights = {name: tensor * 3 if tensor.ndim == 2 else tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_a_teacher_of_the_same_architecture_and_of_another(tmp_path: Path, model: Path) -> None:
    sharp = sharpened(small(tmp_path / "sharp"))
    train = {"backend": "megatron", "ranks": 2, "megatron": {"pp": 2}}
    ours, theirs = distilled(tmp_path / "two", model, sharp, train), distilled(tmp_path / "one", model, sharp, {})
    for config in (ours, theirs):
        api.train(config, view=NullView())
    assert all(row["train/teacher_kl"] > 0.1 for row in measured(ours))
    same(ours, theirs)
    wide = small(tmp_path / "wide", intermediate_size=128)
    other = distilled(tmp_path / "other", model, wide, train)
    with pytest.raises(ConfigError, match=r"teacher:big.*wide has ffn = 128, and the trained model has 64"):
        api.train(other, view=NullView())
    assert not (other.folder / "weights").exists()


def test_sglang_serves_what_megatron_publishes(tmp_path: Path, model: Path) -> None:
    """Log-probs of a real server, under weights that two ranks put together, are those of the ranks."""
    train = {"backend": "megatron", "ranks": 2, "megatron": {"tp": 2}}
    arguments = ("--context-length", "64")
    with running_sglang(model, extra_args=arguments, log_path=tmp_path / "server.log") as server:
        config = recipe(tmp_path, model, steps=STEPS, train=train, rollout={"engine": server.url})
        api.train(config, view=NullView())
    rows = read_metrics(config.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert 0 < max(row["mismatch/mean_abs"] for row in rows) <= 1e-5


ENGINES = {
    "embedded": ("rollout.engine=embedded",),
    "sglang on ray": (
        "placement.runtime=ray", "rollout.sglang.build=cpu", "rollout.sglang.dtype=float32",
        "rollout.sglang.groups=[{args={max-total-tokens=4096}}]", "rollout.context_length=128",
    ),
}  # fmt: skip
"""What the recipe needs on a CPU: its servers are set up for an accelerator."""


@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2(tmp_path: Path, engine: str) -> None:
    """A real model of 135 million parameters with its tokenizer, trained by two stages, on the CPU."""
    folder, runs = fetch(tmp_path / "model"), tmp_path / "runs"
    short = (
        f"model.path={folder}", f"runs_dir={runs}", "device=cpu", "threads=1", *ENGINES[engine],
        "train.dtype=float32", "train.megatron.pp=2", "train.micro_batch_tokens=512", "data.train.size=100",
        "data.eval_prompts=0", "data.strategy.samples=4", "rollout.sampling.max_new_tokens=12", "groups_per_step=2",
        "steps=2", "evaluation.every=0", "evaluation.greedy=false", "obs.live=false", 'rewards=[{type="random"}]',
    )  # fmt: skip
    recipe = str(ROOT / "recipes/smollm2.py")
    assert cli.run(["train", recipe, "--trainer", "megatron", "--train-gpus", "2", *short]) == 0
    rows = read_metrics(runs / "smollm2" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert 0 < max(row["mismatch/mean_abs"] for row in rows) <= 1e-5
