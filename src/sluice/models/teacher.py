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
        ConfigError: the folder is no model with a tokenizer; the tokenizers differ (the first difference is
            named: a token's id, then the special ids); or the teacher has fewer embeddings than the policy.
    """
    theirs, ours = load_tokenizer(folder), load_tokenizer(policy)
    hint = "a teacher scores the policy's own token ids: take a model of the same family, with the same tokenizer"
    ids = {id: token for token, id in theirs.get_vocab().items()}
    own = {id: token for token, id in ours.get_vocab().items()}
    for id in sorted(ids.keys() | own.keys()):
        if ids.get(id) != own.get(id):
            raise ConfigError(
                f"the teacher {name!r} in {folder} has another tokenizer: its token {id} is {_token(ids.get(id))}, "
                f"that of the policy is {_token(own.get(id))}",
                hint=hint,
            )
    for which in _SPECIAL:
        if getattr(theirs, which) != getattr(ours, which):
            raise ConfigError(
                f"the teacher {name!r} in {folder} has another tokenizer: its {which} is {getattr(theirs, which)}, "
                f"that of the policy is {getattr(ours, which)}",
                hint=hint,
            )
    rows, needed = (read_config(each).get_text_config().vocab_size for each in (folder, policy))
    if rows < needed:
        raise ConfigError(
            f"the teacher {name!r} in {folder} has a vocabulary of {rows}, smaller than the policy's {needed}",
            hint=hint,
        )


def _token(token: str | None) -> str:
    return "missing" if token is None else repr(token)
