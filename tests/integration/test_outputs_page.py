"""The tables of `docs/outputs.md` against what runs write: every metric, key and kind is named, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from tests.tiny import rows, tiny

from sluice import errors
from sluice.log import Kind
from sluice.obs.metrics import read_metrics
from sluice.obs.summary import Summary
from sluice.obs.timing import OTHER
from sluice.orchestrate import api, folder
from sluice.rollout.engines.sglang import fleet
from sluice.train import packed_model

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
TWICE = '''
from sluice.rollout.chat.base import ChatMessage
from sluice.rollout.runners.toolkit import chat_messages
from sluice.rollout.session import Ask


class Twice:
    """Two conversations from one question, so that there is a fork."""

    def __init__(self, kit):
        self.kit = kit

    def admit(self, prompt, max_new_tokens):
        self.kit.admit(prompt, max_new_tokens)

    async def run(self, request):
        session = self.kit.session(request)
        await session.ask(Ask(tuple(chat_messages(request.prompt))))
        await session.ask(Ask((ChatMessage("user", "2+2="),)))
        return session.finish()
'''


def names(section: str) -> list[str]:
    """What stands in the first column of a section's table."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def pattern(name: str) -> re.Pattern[str]:
    """A documented name; words in capitals stand for any one name."""
    return re.compile("".join(r"[^/]+" if part.isupper() else re.escape(part) for part in re.split(r"([A-Z]+)", name)))


def in_source(module: Any) -> Iterator[str]:
    """Metrics that need servers or recorded experts, as the code writes or explains them."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    for name in re.findall(r"""["`]((?:engine|routing)/[a-z_/]+(?:\{\w+\})?)["`]""", text):
        yield re.sub(r"\{\w+\}", "any", name)


def written(place: Path) -> set[str]:
    """The names of all metrics of a few tiny runs that have, between them, everything that the embedded engine has."""
    place.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Any]] = []
    for name, lines in (("few", rows()[:6]), ("many", rows()[6:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        source = {"type": "jsonl", "path": str(place / f"{name}.jsonl")}
        parts.append({"name": name, "source": source, "eval_prompts": 2})
    (place / "twice.py").write_text(TWICE)
    masks = {"tis": {}, "icepop": {}, "sequence_mask": {}, "veto": {}, "kl": {"coefficient": 0.1, "where": "loss"}}
    quiet: dict[str, Any] = {"data": {"eval_prompts": 0}, "evaluation": {"every": 0, "greedy": False}}
    init = str(place / "one" / "runs" / "tiny" / "model-init")
    teacher = {"teachers": [{"name": "first", "path": init}]}
    runs: dict[str, dict[str, Any]] = {
        "one": {
            "data": {"train": {"type": "mix", "parts": parts, "path": None}, "padding": {}},
            "algorithm": {"type": "grpo", **masks},
        },
        "ppo": {**quiet, "algorithm": {"type": "ppo", "critic": {"updates": 1}}},
        "cispo": {**quiet, "algorithm": {"type": "cispo"}},
        "dis": {**quiet, "algorithm": {"type": "dis"}},
        "opd": {**quiet, "algorithm": {"type": "opd", "teacher": "first"}, **teacher},
        "turns": {**quiet, "placement": {"colocate": True}},
        "session": {**quiet, "rollout": {"runner": {"type": "python", "path": f"{place / 'twice.py'}:Twice"}}},
    }
    found: set[str] = set()
    for name, changes in runs.items():
        config = tiny(place / name, **{"steps": 1, "groups_per_step": 2, **changes})
        api.train(config)
        found |= {key for row in read_metrics(config.folder / "metrics.jsonl") for key in row}
    return found


def test_every_metric_is_on_the_page_and_every_name_on_the_page_is_a_metric(tmp_path: Path) -> None:
    found = written(tmp_path)
    found |= {*in_source(fleet), *(f"train/{name}" for name in in_source(packed_model))}
    patterns = {name: pattern(name) for name in names("Metrics")}
    unnamed = [name for name in sorted(found) if not any(each.fullmatch(name) for each in patterns.values())]
    assert unnamed == [], "not on the page"
    unknown = [name for name, each in patterns.items() if not any(map(each.fullmatch, found))]
    assert unknown == [], "on the page, but nothing writes it"


def test_phases() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `time/PHASE`")]
    sources = [file.read_text(encoding="utf-8") for file in Path(folder.__file__).parent.glob("*.py")]
    phases = {name for source in sources for name in re.findall(r'phase\("(\w+)"\)', source)}
    assert set(re.findall(r"`(\w+)`", row)) == phases | {OTHER}


def test_the_other_tables_are_what_the_code_says() -> None:
    assert set(names("The result")) == {field.name for field in fields(Summary)}
    assert set(names("The log")) == set(Kind)


def test_every_file_of_a_run_is_on_the_page() -> None:
    there = set(re.findall(r"^    ([\w.-]+)", folder.__doc__ or "", re.MULTILINE))
    assert {"config.json", "model-sft", "engines"} <= there
    assert there - {name.partition("/")[0] for name in names("The folder")} == set()


def test_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SluiceError)]
    raised = {kind.exit_code for kind in kinds if kind is not errors.SluiceError}
    assert listed == raised | {0, 130}
