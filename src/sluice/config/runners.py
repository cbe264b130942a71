"""Runners: who executes an episode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sluice.config.base import Part
from sluice.config.data import ImportPath


class SingleTurnRunner(Part):
    """One question, one answer."""

    type: Literal["single"] = "single"


class ToolsRunner(Part):
    """The model calls Python functions until it answers without a call."""

    type: Literal["tools"] = "tools"
    tools: tuple[ImportPath, ...] = Field(min_length=1)
    """Typed functions with docstrings: `file.py:name` or `module:name`."""
    max_turns: int = Field(default=8, ge=1)
    """Answers of the model in one episode; when they are used up the episode is truncated."""
    tool_seconds: float = Field(default=30.0, gt=0)
    """Deadline of one call; the model is told when it is missed."""
    episode_seconds: float = Field(default=1_800.0, gt=0)
    """Deadline of the whole episode."""


class CommandRunner(Part):
    """Any agent program, started once per episode with a URL, a key and a folder of its own.

    Its environment holds OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY,
    SLUICE_EPISODE_ID and SLUICE_PROMPT (a JSON file with messages and metadata); its working directory is the
    folder.
    """

    type: Literal["command"] = "command"
    command: tuple[str, ...] = Field(min_length=1)
    """The program and its arguments. It never sees the prompt's answer."""
    seconds: float = Field(default=1_800.0, gt=0)
    """Deadline; the program and its children are ended then, and the episode is an infra failure."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further environment variables."""
    verify: tuple[str, ...] = ()
    """A program run in the same folder afterwards, with SLUICE_PROMPT that also holds the answer: the last line
    it prints is a number or a JSON object of reward components, which a reward of type `given` reads."""
    verify_seconds: float = Field(default=300.0, gt=0)
    """Deadline of `verify`."""
    parallel: int = Field(default=16, ge=1)
    """Programs at once."""
    keep: bool = False
    """Keep the folders of finished episodes under the run folder's `agents/`; logs are kept either way."""
    template: Path | None = None
    """Folder whose content each episode's folder begins with."""


class ExternalRunner(Part):
    """Agents elsewhere lease prompts over HTTP (`POST /sessions`) when they are ready for one."""

    type: Literal["external"] = "external"
    lease_seconds: float = Field(default=3_600.0, gt=0)
    """A leased prompt whose session is not finished by then is an infra failure."""


class PythonRunner(Part):
    """A runner of your own: a class that satisfies `sluice.rollout.runners.base.Runner`."""

    type: Literal["python"] = "python"
    path: ImportPath
    """The class: `file.py:Name` or `module:Name`; it is given a `Toolkit` and `params`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


RunnerConfig = Annotated[
    SingleTurnRunner | ToolsRunner | CommandRunner | ExternalRunner | PythonRunner, Field(discriminator="type")
]
