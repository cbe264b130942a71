"""Promises that every config class keeps, and what importing Sluice must not import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import sluice
from sluice.config.base import Part
from sluice.config.load import FREE_FORM, PATHS
from sluice.config.run import RunConfig
from sluice.config.shape import allows_none, alternatives, nested_parts


def parts() -> list[type[Part]]:
    found: list[type[Part]] = [RunConfig]
    for part in found:  # grows while it is walked
        inner = [kind for field in part.model_fields.values() for kind in nested_parts(field.annotation)]
        found += [kind for kind in dict.fromkeys(inner) if kind not in found]
    return found


def all_fields() -> Iterator[tuple[str, str, FieldInfo]]:
    for part in parts():
        for name, field in part.model_fields.items():
            yield part.__name__, name, field


def test_the_walk_reaches_every_config_class() -> None:
    def subclasses(kind: type[Part]) -> Iterator[type[Part]]:
        for sub in kind.__subclasses__():
            yield sub
            yield from subclasses(sub)

    ours = {kind for kind in subclasses(Part) if kind.__module__.startswith("sluice.config")}
    unreached = ours - set(parts())
    assert [kind for kind in unreached if not any(issubclass(part, kind) for part in parts())] == [], "no shared base"


def test_every_field_is_documented() -> None:
    bare = [f"{part}.{name}" for part, name, field in all_fields() if not field.description and name != "type"]
    assert bare == []


def test_every_part_is_documented_frozen_and_strict() -> None:
    for part in parts():
        assert part.__doc__, part
        assert part.model_config.get("frozen") is True, part
        assert part.model_config.get("extra") == "forbid", part


def test_a_config_cannot_be_changed() -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": {"type": "jsonl", "path": "x"}},
            "rewards": [{"type": "exact"}],
        }
    )
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_what_may_be_none_is_none_by_default() -> None:
    """The TOML form leaves None out, so None must be what a missing key means."""
    odd = [f"{part}.{name}" for part, name, field in all_fields() if allows_none(field.annotation) and field.default]
    assert odd == []


def test_paths_and_free_form_tables_have_the_names_the_loader_knows() -> None:
    for part, name, field in all_fields():
        if Path in alternatives(field.annotation) and name != "runs_dir":
            assert name in PATHS, f"{part}.{name} would not be found beside its recipe"
        if any(getattr(rule, "pattern", "") == r"^[^:]+:[A-Za-z_][A-Za-z0-9_.]*$" for rule in field.metadata):
            assert name in PATHS, f"{part}.{name} would not be found beside its recipe"
        if get_origin(field.annotation) is dict:
            assert name in FREE_FORM, f"{part}.{name}: add it to FREE_FORM"


@pytest.mark.parametrize("module", ["sluice", "sluice.config", "sluice.config.load", "sluice.cli", "sluice.log"])
def test_importing_stays_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers', 'sglang') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_surface() -> None:
    assert set(sluice.__all__) == {
        "RunConfig", "__version__", "dpo", "evaluate", "generate", "load_recipe", "sft", "train",
    }  # fmt: skip
    assert sluice.RunConfig is RunConfig
    assert dir(sluice) == sorted(sluice.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sluice.trian  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("first", ["sluice.train.packing", "sluice"])
def test_train_is_callable_whatever_was_imported_first(first: str) -> None:
    """`sluice.train` is a package too; importing it must not hide the function."""
    code = (
        f"import sys, types, {first}, sluice\n"
        "api = types.SimpleNamespace(train=lambda config, **options: (config, options))\n"
        "sys.modules['sluice.orchestrate.api'] = api\n"
        "print(sluice.train('c', resume=True))\n"
        "import sluice.train.packing as packing\n"
        "print(packing.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["('c', {'resume': True})", "sluice.train.packing"]


def test_the_version_is_that_of_the_project() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{sluice.__version__}"' in project


def test_the_lock_pins_every_dependency() -> None:
    import re
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    names = {re.split(r"[<>=!\[~ ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    lines = [line for line in (root / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert names <= {line.partition("==")[0] for line in lines}
