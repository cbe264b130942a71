"""Teachers: frozen policies whose log-probs of the policy's own tokens an algorithm asks for."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sluice.config.base import Part

NAME = r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$"
"""What a teacher may be called."""


class TeacherConfig(Part):
    """A model that is never trained. It has the policy's tokenizer, and at least its vocabulary."""

    name: str = Field(pattern=NAME)
    """What algorithms call it; its log-probs are the stream `teacher:NAME`."""
    path: Path
    """Folder with `config.json`, safetensors and tokenizer files."""
