"""`model.chat_template`: one file, and every part of a run renders with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import SCRATCH, tiny
from transformers import AutoTokenizer

from sluice.config import RunConfig
from sluice.config.load import load_recipe
from sluice.config.model import ScratchConfig
from sluice.errors import ConfigError
from sluice.log import EpisodeRecord, Kind, LogReader
from sluice.models.build import load_tokenizer, make_scratch
from sluice.orchestrate import api
from sluice.orchestrate.exporting import export
from sluice.orchestrate.serve import FolderSource
from sluice.orchestrate.setup import initial_model
from sluice.weights.lineage import Lineage
from sluice.weights.store import WeightStore

OWN = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user><assistant>' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose tokenizer has another template."""
    folder = tmp_path / "base"
    make_scratch(ScratchConfig.model_validate(SCRATCH), folder, seed=0)
    return folder


def recipe(base: Path, text: str | bytes = OWN, **changes: Any) -> RunConfig:
    file = base.parent / "own.jinja"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    model = {"scratch": None, "path": str(base), "chat_template": str(file)}
    return tiny(base.parent, model=model, steps=2, **changes)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def asked(text: str, folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def test_a_run_asks_serves_keeps_and_exports_with_it(base: Path) -> None:
    before = digests(base)
    config = recipe(base)
    api.train(config)
    episodes = [
        entry.record.episode
        for entry in LogReader(config.folder / "log").read(kinds=(Kind.EPISODE,))
        if isinstance(entry.record, EpisodeRecord)
    ]
    assert len(episodes) >= 32
    for episode in episodes:
        question = episode.prompt.messages[0].content
        turn = episode.segments[0].turns[0]
        assert list(turn.ids) == asked(f"{question}<user><assistant>", base)
    made = initial_model(config, config.folder)
    served = WeightStore(config.folder / "weights", made, Lineage()).publish(FolderSource(made), 0).folder()
    kept = config.folder / "checkpoints/step-000002/model"
    taken = export(config.folder, base.parent / "taken").folder
    for folder in (made, served, kept, taken):
        assert AutoTokenizer.from_pretrained(folder).chat_template == OWN, folder
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    assert (made / "model.safetensors").is_symlink(), "weights are not copied"
    assert not (taken / "model.safetensors").is_symlink()
    assert digests(base) == before


def test_a_resumed_run_keeps_it_or_says_that_it_changed(base: Path) -> None:
    config = recipe(base)
    api.train(config)
    api.train(config.model_copy(update={"steps": 3}), resume=True)
    recipe(base, OWN.replace("<user>", ""))
    with pytest.raises(ConfigError, match="not the template that this run began with"):
        api.train(config.model_copy(update={"steps": 4}), resume=True)


def test_a_tokenizer_without_a_template_gets_one(base: Path) -> None:
    (base / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    config = recipe(base)
    assert 0 <= api.evaluate(config, base)["accuracy"] <= 2
    api.train(config)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "own.jinja, line 2: not a Jinja template"),
        ("{% for m in messages %}{{ m.content }}", "line 1: not a Jinja template"),
        ("Answer briefly.", "leaves out what the user says: a question becomes 'Answer briefly.'"),
        ("{{ raise_exception('a system prompt is needed') }}", "a system prompt is needed"),
        ("{{ messages[3].content }}", "does not take a conversation of one question"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused_before_anything_is_made(base: Path, text: str | bytes, told: str) -> None:
    config = recipe(base, text)
    with pytest.raises(ConfigError) as caught:
        api.train(config)
    assert told in str(caught.value)
    assert not (config.folder / "model-init").exists()


def test_a_missing_file_and_a_model_from_scratch_are_refused(base: Path) -> None:
    config = recipe(base)
    (base.parent / "own.jinja").unlink()
    with pytest.raises(ConfigError, match=r"own\.jinja cannot be read: .*No such file"):
        api.train(config)
    with pytest.raises(ValueError, match=r"model\.scratch\.tokenizer\.chat_template"):
        tiny(base.parent, model={"chat_template": "own.jinja"})


def test_the_file_is_found_beside_its_recipe(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(base)
    values = {
        **config.model_dump(mode="json", exclude_none=True),
        "model": {"path": "base", "chat_template": "own.jinja"},
    }
    (base.parent / "recipe.json").write_text(json.dumps(values))
    (elsewhere := base.parent / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_recipe(str(base.parent / "recipe.json")).model.chat_template == base.parent / "own.jinja"
