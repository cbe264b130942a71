"""DPO: its gradient is that of the published loss for any split; pairs that are none are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_cases import make_samples, padded_logprobs, plain_model, scratch

from sluice.algos.dpo import DPO
from sluice.config.preferences import JsonlPairs, PairColumns
from sluice.config.train import TrainConfig
from sluice.data.sources.pairs import load_pairs
from sluice.errors import DataError
from sluice.train.backends.torch import TorchTrainer
from sluice.train.packing import make_batch
from sluice.types import TrainSample

torch.set_num_threads(1)
BETA = 0.3


def _pairs(seed: int = 0) -> list[tuple[TrainSample, ...]]:
    """Three pairs; the chosen answer of the first has two segments. `make_samples` gives episodes of two each."""
    s = make_samples((12, 30, 7, 9, 25, 32, 11, 18), seed=seed)
    return [(s[0], s[1], s[2]), (s[4], s[3]), (s[6], s[5])]


def _by_hand(model: torch.nn.Module, reference: torch.nn.Module, pairs: list[tuple[TrainSample, ...]]) -> torch.Tensor:
    """-1/N Σ log σ(m), from plain transformers; `[pairs]` margins come along."""
    margins = []
    for pair in pairs:
        new = padded_logprobs(model, pair)
        with torch.no_grad():
            old = padded_logprobs(reference, pair)
        margin = torch.zeros((), dtype=torch.float64)
        for sample, ours, theirs in zip(pair, new, old, strict=True):
            gain = (ours - theirs)[torch.from_numpy(sample.trained)].sum()
            margin = margin + (gain if sample.episode_id == pair[0].episode_id else -gain)
        margins.append(BETA * margin)
    return torch.stack(margins)


def test_the_gradient_is_that_of_the_published_loss_for_every_split(tmp_path: Path) -> None:
    start, moved = scratch(tmp_path / "a"), scratch(tmp_path / "b", seed=3)
    pairs = _pairs()
    trainer = TorchTrainer(TrainConfig(micro_batch_tokens=64), start, total_steps=1, seed=0)
    other = plain_model(moved, torch.float32)
    with torch.no_grad():  # half-way to other weights, so that margins are neither zero nor huge
        for name, parameter in trainer.model.named_parameters():
            parameter.lerp_(other.get_parameter(name), 0.05)
    model, reference = plain_model(start, torch.float64), plain_model(start, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.model.get_parameter(name))
    margins = _by_hand(model, reference, pairs)
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    objective = DPO(BETA)
    samples = iter(trainer.score([sample for pair in pairs for sample in pair], objective.requires))
    scored = [tuple(next(samples) for _ in pair) for pair in pairs]
    report = objective.report(scored)
    assert margins.detach().numpy() == pytest.approx(objective.margins(scored), abs=1e-3)
    assert float(margins.detach().abs().min()) > 0.05
    assert report["loss"] == pytest.approx(float(loss.detach()), rel=1e-3)
    assert report["accuracy"] == float((margins > 0).double().mean())
    assert report["margin"] == pytest.approx(float(margins.detach().mean()), abs=1e-3)
    advantages = objective.credit(scored)
    credited = [sample.with_streams(advantage=advantages[sample.key]) for pair in scored for sample in pair]
    trainer.model.double()
    for budget in (32, 64, 1000):
        batch = make_batch(credited, budget=budget, normaliser=objective.normaliser, constant=objective.constant)
        for name, gradient in trainer.gradients(batch, objective.loss).items():
            error = float((gradient - expected[name]).norm() / expected[name].norm())
            assert error <= 1e-4, f"{name}: {error}"  # σ(-m) comes from float32 scores


def test_credit_is_the_slope_of_the_loss() -> None:
    rng = np.random.default_rng(1)
    pairs = [
        tuple(s.with_streams(proximal=rng.normal(size=len(s)), reference=rng.normal(size=len(s))) for s in pair)
        for pair in _pairs()
    ]
    advantages = DPO(BETA).credit(pairs)
    for pair in pairs:
        margin = 0.0
        for sample in pair:
            sign = 1 if sample.episode_id == pair[0].episode_id else -1
            for t in range(len(sample)):
                if sample["weight"][t]:
                    margin += sign * BETA * (float(sample["proximal"][t]) - float(sample["reference"][t]))
        for sample in pair:
            sign = 1 if sample.episode_id == pair[0].episode_id else -1
            slope = sign * BETA / (1 + np.exp(margin)) * 7 / 3  # 7 segments in 3 pairs
            assert advantages[sample.key] == pytest.approx(np.where(sample.trained, slope, 0.0), rel=1e-12)
    huge = [tuple(s.with_streams(proximal=s["proximal"] * 1e6) for s in pair) for pair in pairs]
    assert all(np.isfinite(values).all() for values in DPO(BETA).credit(huge).values())
    level = [tuple(s.with_streams(proximal=s["reference"]) for s in pair) for pair in pairs]
    assert DPO(BETA).report(level) == {"loss": pytest.approx(np.log(2)), "accuracy": 0.5, "margin": 0.0}


def _file(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD, {"q": {"text": "2+2="}, "good": "4", "bad": "5"})
    (pair,) = load_pairs(JsonlPairs(path=path, on_bad_row="skip"))
    assert (pair.prompt.messages[0].content, pair.chosen, pair.rejected) == ("1+1=", "2", "3")
    columns = PairColumns(prompt="q.text", answer="good", rejected="bad")
    (pair,) = load_pairs(JsonlPairs(path=path, on_bad_row="skip", columns=columns))
    assert (pair.prompt.messages[0].content, pair.chosen, pair.rejected) == ("2+2=", "4", "5")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "1+1=", "chosen": "2"}, "there is no column 'rejected'"),
        ({**GOOD, "chosen": ["2"]}, "column 'chosen' is a list, not a string"),
        ({**GOOD, "rejected": "  "}, "column 'rejected' is empty"),
        ({**GOOD, "rejected": "2"}, "columns 'chosen' and 'rejected' are equal"),
        ({"chosen": "2", "rejected": "3"}, "no column 'prompt'"),
        (3, "is a number, not an object"),
    ],
)
def test_rows_that_are_no_pair(tmp_path: Path, row: object, says: str) -> None:
    path = _file(tmp_path, GOOD, row)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2.*{says}"):
        load_pairs(JsonlPairs(path=path))
    assert len(load_pairs(JsonlPairs(path=path, on_bad_row="skip"))) == 1
    with pytest.raises(DataError, match="holds no usable row"):
        load_pairs(JsonlPairs(path=_file(tmp_path), on_bad_row="skip"))
