"""The streams that an algorithm requires, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sluice.algos.base import ActorCritic, Algorithm
from sluice.config.teachers import TeacherConfig
from sluice.errors import ConfigError
from sluice.models.teacher import check_teacher
from sluice.nearest import did_you_mean
from sluice.orchestrate.learner import VALUE

_TEACHER = "teacher:"
_OWN = frozenset({"proximal", "reference"})
"""Streams that need no model besides the policy's."""


def frozen_policies(algorithm: Algorithm, teachers: Sequence[TeacherConfig], policy: Path) -> dict[str, Path]:
    """Folders of the teachers that fill the required streams, by stream.

    Args:
        algorithm: says which streams it requires.
        teachers: what the recipe configures.
        policy: Hugging Face folder of the policy's first weights.

    Raises:
        ConfigError: a required stream is unknown or its teacher is not configured; a teacher is configured
            and not required; or a teacher cannot score the policy's tokens, see `check_teacher`.
    """
    folders = {f"{_TEACHER}{teacher.name}": teacher.path for teacher in teachers}
    requires = algorithm.requires
    for stream in sorted(requires):
        if stream in _OWN or stream in folders:
            continue
        if stream == VALUE:
            _check_critic(algorithm)
            continue
        if not stream.startswith(_TEACHER):
            known = [*sorted(_OWN), VALUE, f"{_TEACHER}NAME"]
            raise ConfigError(
                f"the algorithm requires the stream {stream!r}, which nothing fills",
                hint=did_you_mean(stream, known, otherwise=f"streams are {', '.join(known)}"),
            )
        name, names = stream.removeprefix(_TEACHER), [teacher.name for teacher in teachers]
        raise ConfigError(
            f"the algorithm requires the teacher {name!r}, and teachers names "
            f"{', '.join(map(repr, names)) if names else 'none'}",
            hint=f'add {{ name = "{name}", path = "FOLDER" }} to teachers',
        )
    for teacher in teachers:
        if f"{_TEACHER}{teacher.name}" not in requires:
            raise ConfigError(
                f"teachers names {teacher.name!r}, which the algorithm does not ask for",
                hint="take it out of teachers, or choose an algorithm that learns from it, such as 'opd'",
            )
        check_teacher(teacher.name, teacher.path, policy)
    return folders


def _check_critic(algorithm: Algorithm) -> None:
    if not isinstance(algorithm, ActorCritic):
        raise ConfigError(
            f"the algorithm {type(algorithm).__name__} requires the stream 'value', and does not say how the critic "
            "that fills it is trained",
            hint="give it `critic`, `targets` and `value_loss`; see sluice.algos.base.ActorCritic",
        )
