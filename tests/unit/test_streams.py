"""Teachers and required streams: what cannot work is refused by name before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.tiny import tiny
from train_cases import TEMPLATE, WORDS, make_samples, padded_logprobs, plain_model, scratch

from sluice.algos.base import Algorithm
from sluice.algos.grpo import GRPO
from sluice.config.algos import GRPOConfig
from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.config.teachers import TeacherConfig
from sluice.config.train import TrainConfig
from sluice.errors import ConfigError
from sluice.models.build import load_tokenizer, make_scratch
from sluice.orchestrate.streams import frozen_policies
from sluice.train.backends.torch import TorchTrainer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch(tmp_path_factory.mktemp("policy"))


def _needs(streams: set[str]) -> Algorithm:
    """An algorithm that requires these streams and is else GRPO."""

    class Needy(GRPO):
        requires = frozenset(streams)  # type: ignore[assignment]

    return Needy(GRPOConfig())


def _teacher(path: Path, name: str = "big") -> list[TeacherConfig]:
    return [TeacherConfig(name=name, path=path)]


def test_a_teacher_fills_its_stream_and_the_reference_stays_the_start(policy: Path, tmp_path: Path) -> None:
    big = scratch(tmp_path / "big", seed=7, model_type="llama", tie_word_embeddings=False, num_hidden_layers=3)
    frozen = frozen_policies(_needs({"proximal", "reference", "teacher:big"}), _teacher(big), policy)
    assert frozen == {"teacher:big": big}
    trainer = TorchTrainer(TrainConfig(micro_batch_tokens=64), policy, total_steps=1, seed=0, frozen=frozen)
    samples = make_samples((12, 30, 7))
    scored = trainer.score(samples, frozenset({"teacher:big", "reference", "proximal"}))
    for folder, stream in ((big, "teacher:big"), (policy, "reference")):
        expected = padded_logprobs(plain_model(folder, torch.float32).double(), samples)
        for sample, values in zip(scored, expected, strict=True):
            want = np.where(sample.trained, values.detach().numpy(), 0.0)
            np.testing.assert_allclose(sample[stream], want, atol=2e-5)
            assert sample["reference"].tolist() == sample["proximal"].tolist()


def test_streams_that_nothing_fills(policy: Path) -> None:
    with pytest.raises(ConfigError, match=r"requires the stream 'referense'.*\n.*did you mean 'reference'"):
        frozen_policies(_needs({"referense"}), [], policy)
    with pytest.raises(ConfigError, match=r"Needy requires the stream 'value', and does not say"):
        frozen_policies(_needs({"value"}), [], policy)
    with pytest.raises(ConfigError, match=r"requires the teacher 'big', and teachers names none"):
        frozen_policies(_needs({"teacher:big"}), [], policy)
    with pytest.raises(ConfigError, match=r"requires the teacher 'big', and teachers names 'small'"):
        frozen_policies(_needs({"teacher:big"}), _teacher(policy, "small"), policy)
    with pytest.raises(ConfigError, match=r"teachers names 'big', which the algorithm does not ask for"):
        frozen_policies(_needs({"reference"}), _teacher(policy), policy)


def _model(folder: Path, words: tuple[str, ...]) -> Path:
    architecture = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    tokenizer = TokenizerConfig(words=words, chat_template=TEMPLATE)
    make_scratch(ScratchConfig(architecture=architecture, tokenizer=tokenizer), folder, seed=0)
    return folder


def test_teachers_that_read_other_tokens(policy: Path, tmp_path: Path) -> None:
    def refuse(path: Path, says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            frozen_policies(_needs({"teacher:big"}), _teacher(path), policy)

    refuse(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"has no config\.json")
    swapped = _model(tmp_path / "swapped", (WORDS[1], WORDS[0], *WORDS[2:]))
    refuse(swapped, r"'big'.*another tokenizer: its token 5 is 'b', that of the policy is 'a'")
    shorter = _model(tmp_path / "shorter", WORDS[:-1])
    refuse(shorter, r"its token 26 is ' a', that of the policy is '='")
    other = _model(tmp_path / "other", WORDS)
    tokenizer = load_tokenizer(other)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(other)
    refuse(other, "its eos_token_id is 2, that of the policy is 1")


def test_a_teacher_with_fewer_embeddings(policy: Path, tmp_path: Path) -> None:
    """Models pad their vocabularies: the policy may then have more rows than a teacher of the same tokenizer."""
    padded = tmp_path / "padded"
    shutil.copytree(policy, padded)
    config = padded / "config.json"
    rows = load_tokenizer(policy).vocab_size
    config.write_text(config.read_text().replace(f'"vocab_size": {rows}', '"vocab_size": 64'))
    with pytest.raises(ConfigError, match=f"a vocabulary of {rows}, smaller than the policy's 64"):
        frozen_policies(_needs({"teacher:big"}), _teacher(policy), padded)
    assert frozen_policies(_needs({"teacher:big"}), _teacher(padded), policy) == {"teacher:big": padded}


def test_names_of_teachers(tmp_path: Path) -> None:
    for bad in ("", "a b", "a__b", "a:b", "-a"):
        with pytest.raises(ValidationError, match="pattern"):
            TeacherConfig(name=bad, path=tmp_path)
    twice = [{"name": "big", "path": "x"}] * 2
    with pytest.raises(ValidationError, match="the name 'big' is used twice"):
        tiny(tmp_path, teachers=twice)
