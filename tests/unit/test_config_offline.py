"""`offline = true`: what is refused, what is found, and that no address field escapes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from sluice.config.base import ADDRESS_TYPES, Part, Url
from sluice.config.load import load_recipe, resolved_json, resolved_toml
from sluice.config.offline import hosts, refusals
from sluice.config.run import RunConfig
from sluice.config.shape import nested_parts
from sluice.errors import ConfigError

ADDRESS_NAMES = ("url", "urls", "uri", "endpoint", "endpoints", "addr", "address")
"""A field whose last word is one of these holds an address."""


class Service(Part):
    """A part with a host of its own."""

    url: Url | None = None
    more: tuple[Url, ...] = ()

    def hosts(self) -> tuple[str, ...]:
        return ("api.service.example",)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    kinds: list[type[Part]] = [RunConfig]
    for kind in kinds:  # grows while it is walked
        for name, field in kind.model_fields.items():
            yield f"{kind.__name__}.{name}", field
            kinds += [part for part in nested_parts(field.annotation) if part not in kinds]


def rules(annotation: Any) -> Iterator[object]:
    """What `Annotated` adds anywhere inside an annotation."""
    for inner in (*getattr(annotation, "__metadata__", ()), *get_args(annotation)):
        yield inner
        yield from rules(inner)


def is_address(field: FieldInfo) -> bool:
    found = (*field.metadata, *rules(field.annotation))
    return any(isinstance(rule, AfterValidator) and rule.func in ADDRESS_TYPES for rule in found)


def test_every_field_named_like_an_address_has_an_address_type() -> None:
    named = [(place, field) for place, field in fields() if place.rsplit(".")[-1].split("_")[-1] in ADDRESS_NAMES]
    assert {"SGLangConfig.urls", "EngineGroup.dist_init_addr"} <= {place for place, _ in named}
    assert [place for place, field in named if not is_address(field)] == [], "give it a type of sluice.config.base"


def recipe(**values: Any) -> dict[str, Any]:
    return {
        "model": {"path": "m"},
        "data": {"train": {"type": "jsonl", "path": "x"}},
        "rewards": [{"type": "exact"}],
        **values,
    }


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rollout": {"engine": "http://gpu7:30000"}}, "rollout.engine reaches gpu7"),
        ({"placement": {"runtime": "ray", "address": "head.example:6379"}}, "placement.address reaches head.example"),
        ({"placement": {"runtime": "ray", "address": "ray://head:10001"}}, "placement.address reaches head"),
        ({"rollout": {"engine": "http://[2001:db8::1]:30000"}}, "rollout.engine reaches 2001:db8::1"),
        (
            {"rollout": {"engine": "sglang", "sglang": {"urls": ["http://localhost:1", "https://a.example"]}}},
            "rollout.sglang.urls.1 reaches a.example",
        ),
        (
            {"rollout": {"engine": "sglang", "sglang": {"groups": [{"nodes": 2, "dist_init_addr": "10.0.0.1:5000"}]}}},
            "rollout.sglang.groups.0.dist_init_addr reaches 10.0.0.1",
        ),
        (
            {"rewards": [{"type": "python", "path": "r.py:f", "params": {"judge": {"at": "HTTPS://J.Example/v1"}}}]},
            "rewards.0.params.judge.at reaches j.example",
        ),
        (
            {"rollout": {"runner": {"type": "command", "command": ["agent", "--base=https://x.example:8/v1"]}}},
            "rollout.runner.command.1 reaches x.example",
        ),
        (
            {"rollout": {"sglang": {"env": {"HF_ENDPOINT": "https://mirror.example"}}}},
            "rollout.sglang.env.HF_ENDPOINT reaches mirror.example",
        ),
    ],
)
def test_a_host_elsewhere_is_refused_with_its_key(values: dict[str, Any], expected: str) -> None:
    RunConfig.model_validate(recipe(**values))
    with pytest.raises(ValidationError, match="offline = true, but") as caught:
        RunConfig.model_validate(recipe(offline=True, **values))
    assert f"but {expected}: leave it out" in str(caught.value)
    host = expected.rpartition(" ")[2]
    RunConfig.model_validate(recipe(offline=True, allow_hosts=[host], **values))


@pytest.mark.parametrize(
    "engine",
    [
        "embedded",
        "http://127.0.0.1:1",
        "http://127.8.9.10",
        "http://localhost:80",
        "http://[::1]:5",
        "http://a.localhost",
    ],
)
def test_this_machine_is_allowed(engine: str) -> None:
    assert RunConfig.model_validate(recipe(offline=True, rollout={"engine": engine})).offline


@pytest.mark.parametrize(
    ("rule", "host", "allowed"),
    [
        ("judge.example", "judge.example", True),
        ("Judge.Example.", "judge.example", True),
        ("judge.example", "evil-judge.example", False),
        ("*.example", "a.b.example", True),
        ("*.example", "example", False),
        ("*.example", "notexample", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "10.host.example", False),
    ],
)
def test_the_rules_of_allow_hosts(rule: str, host: str, allowed: bool) -> None:
    service = Service.model_validate({"url": f"https://{host}/v1"})
    assert (refusals(service, [rule, "api.service.example"]) == []) is allowed


def test_a_part_may_declare_hosts_of_its_own() -> None:
    service = Service.model_validate({"url": "https://A.example:9/x", "more": ["http://b.example"]})
    assert list(hosts(service, "judge")) == [
        ("judge", "api.service.example"), ("judge.url", "a.example"), ("judge.more.0", "b.example"),
    ]  # fmt: skip


def test_text_that_mentions_a_url_is_no_address() -> None:
    source = {"type": "jsonl", "path": "x", "system": "Cite https://arxiv.org when you can."}
    assert RunConfig.model_validate(recipe(offline=True, data={"train": source})).offline


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://h", "is no URL"),
        ("h:80", "is no URL"),
        ("http://", "is no URL"),
        ("http://h:99999", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://h /x", "is no URL"),
        ("https://me:secret@h", "a URL with a user or password"),
    ],
)
def test_what_is_no_url(url: str, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Service.model_validate({"url": url})


def test_allow_hosts_without_offline_would_do_nothing() -> None:
    with pytest.raises(ValidationError, match="allow_hosts is read with offline = true"):
        RunConfig.model_validate(recipe(allow_hosts=["h"]))


def test_the_error_names_the_line(tmp_path: Any) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        'offline = true\nmodel = { path = "m" }\nrewards = [{ type = "exact" }]\n'
        '[data.train]\ntype = "jsonl"\npath = "x"\n[rollout]\nengine = "http://gpu7:30000"\n'
    )
    with pytest.raises(ConfigError, match=r"r\.toml:8\]"):
        load_recipe(str(file))


def test_an_address_is_plain_text_when_the_configuration_is_written(tmp_path: Any) -> None:
    config = RunConfig.model_validate(recipe(rollout={"engine": "http://gpu7:30000"}))
    assert '"engine": "http://gpu7:30000"' in resolved_json(config)
    file = tmp_path / "again.toml"
    file.write_text(resolved_toml(config))
    assert load_recipe(str(file)).rollout.engine == "http://gpu7:30000"


def test_hugging_face_libraries_stay_offline_even_when_they_are_imported_already() -> None:
    code = (
        "import huggingface_hub.constants, os\n"
        "assert not huggingface_hub.constants.is_offline_mode()\n"
        "from sluice.models.offline import go_offline\n"
        "go_offline()\n"
        "print(huggingface_hub.constants.is_offline_mode(), os.environ['HF_DATASETS_OFFLINE'])\n"
    )
    clean = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=clean
    )
    assert done.stdout.split() == ["True", "1"]
