"""A chat template of the user's own in the place of the tokenizer's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sluice.errors import ConfigError
from sluice.models.build import check_model_folder, load_tokenizer

TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers, SGLang and vLLM look for a folder's template first."""
_PROBE = "q5sluice"
_COPIED = frozenset({".json", ".txt", ".model"})
_OTHER_TEMPLATES = ("chat_template.json", TEMPLATE_FILE)


def read_chat_template(file: Path) -> str:
    """The text of a template file, compiled once and tried on a question.

    Raises:
        ConfigError: there is no such file, it is no Jinja template (names the line), or what it makes of a question
            does not hold the question.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template {file} cannot be read: {error}", hint="set model.chat_template to a Jinja file"
        ) from error
    try:
        question = [{"role": "user", "content": _PROBE}]
        shown = render_jinja_template([question], chat_template=text, add_generation_prompt=True)[0][0]
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{file}, line {error.lineno}: not a Jinja template: {error.message}", hint="mend the file"
        ) from error
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the chat template {file} does not take a conversation of one question: {type(error).__name__}: {error}",
            hint="it is given messages (role, content), tools and add_generation_prompt",
        ) from error
    if _PROBE not in shown:
        raise ConfigError(
            f"the chat template {file} leaves out what the user says: a question becomes {shown[:80]!r}",
            hint="loop over messages and print message.content",
        )
    return text


def put_chat_template(source: Path, target: Path, text: str) -> None:
    """Make `target`, an empty folder, the model of `source` with another template. Weights are linked, not copied.

    Raises:
        ConfigError: `source` is no model folder.
    """
    check_model_folder(source)
    for file in sorted(source.resolve().iterdir()):
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        elif file.is_file() and file.suffix in _COPIED and file.name not in _OTHER_TEMPLATES:
            shutil.copy2(file, target / file.name)
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        content.pop("chat_template", None)
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / TEMPLATE_FILE).write_text(text, encoding="utf-8")


def load_templated(folder: Path, file: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with the template of `file` where one is given.

    Raises:
        ConfigError: see `load_tokenizer` and `read_chat_template`.
    """
    tokenizer = load_tokenizer(folder)
    if file is not None:
        tokenizer.chat_template = read_chat_template(file)
    return tokenizer
