"""The policy's model: an existing Hugging Face folder, or a small one made from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import Part

DType = Literal["float32", "bfloat16"]


class TokenizerConfig(Part):
    """A word-level tokenizer made on the spot: `words` are tokens, digits and punctuation single ones."""

    words: tuple[str, ...]
    """Vocabulary besides the special tokens, in order. Text is split at spaces and around single digits
    and punctuation marks; anything not listed becomes the unknown token."""
    chat_template: str
    """Jinja template that `apply_chat_template` uses."""


class ScratchConfig(Part):
    """A randomly initialised model: for demos and tests, where no weights can be downloaded."""

    architecture: dict[str, Any]
    """Keyword arguments of the Hugging Face config class, with `model_type` among them."""
    tokenizer: TokenizerConfig
    """Its tokenizer."""


class ModelConfig(Part):
    """Exactly one of `path` and `scratch`."""

    path: Path | None = None
    """Folder with `config.json`, safetensors and tokenizer files."""
    scratch: ScratchConfig | None = None
    """Make a small random model instead."""
    chat_template: Path | None = None
    """A Jinja file that replaces the chat template of `path`'s tokenizer, for training, gateway, checkpoints and
    export alike. Read when the run begins, and kept in its `model-init`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the chat template, such as `enable_thinking`."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("set exactly one of model.path and model.scratch")
        if self.scratch is not None and self.chat_template is not None:
            raise ValueError(
                "model.chat_template replaces the template of model.path; one made from scratch has "
                "model.scratch.tokenizer.chat_template"
            )
        return self
