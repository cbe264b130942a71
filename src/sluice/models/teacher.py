"""Whether a model can score the tokens of another: the two must mean the same by every id."""

from __future__ import annotations

from pathlib import Path

from sluice.errors import ConfigError
from sluice.models.build import load_tokenizer, read_config

_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


def check_teacher(name: str, folder: Path, policy: Path) -> None:
    """Refuse a teacher that would read other tokens than the policy wrote.

    Args:
        name: of the teacher, for the message.
        folder: Hugging Face folder of the teacher.
        policy: that of the policy's first weights.

    Raises:
        ConfigError: the folder is no model with a tokenizer; the tokenizers differ, see `check_same_tokens`; or the
            teacher has fewer embeddings than the policy.
    """
    who = f"the teacher {name!r} in {folder}"
    hint = "a teacher scores the policy's own token ids: take a model of the same family, with the same tokenizer"
    check_same_tokens(who, folder, policy, hint=hint)
    rows, needed = (read_config(each).get_text_config().vocab_size for each in (folder, policy))
    if rows < needed:
        raise ConfigError(f"{who} has a vocabulary of {rows}, smaller than the policy's {needed}", hint=hint)


def check_same_tokens(who: str, folder: Path, policy: Path, *, hint: str) -> None:
    """Compare two tokenizers by content: vocabularies, then special ids.

    Args:
        who: whose the first folder is, for the message.
        folder, policy: Hugging Face folders.
        hint: the next move when they differ.

    Raises:
        ConfigError: a folder is no model with a tokenizer, or they differ; the first difference is named.
    """
    theirs, ours = load_tokenizer(folder), load_tokenizer(policy)
    ids = {id: token for token, id in theirs.get_vocab().items()}
    own = {id: token for token, id in ours.get_vocab().items()}
    for id in sorted(ids.keys() | own.keys()):
        if ids.get(id) != own.get(id):
            raise ConfigError(
                f"{who} has another tokenizer: its token {id} is {_token(ids.get(id))}, "
                f"that of the policy is {_token(own.get(id))}",
                hint=hint,
            )
    for which in _SPECIAL:
        if getattr(theirs, which) != getattr(ours, which):
            raise ConfigError(
                f"{who} has another tokenizer: its {which} is {getattr(theirs, which)}, "
                f"that of the policy is {getattr(ours, which)}",
                hint=hint,
            )


def _token(token: str | None) -> str:
    return "missing" if token is None else repr(token)
