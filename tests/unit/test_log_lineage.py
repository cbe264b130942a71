"""Which dispositions survive a resume, and what an account of the log finds."""

from __future__ import annotations

from sluice.log import (
    Disposition,
    DispositionRecord,
    Entry,
    EpisodeRecord,
    EvalRecord,
    Record,
    ResumeRecord,
    RewardRecord,
    account,
)
from sluice.types import Episode, Outcome, Prompt, Reward, Version


def log(*records: Record) -> list[Entry]:
    return [Entry(seq, float(seq), record) for seq, record in enumerate(records, 1)]


def finished(id: str) -> EpisodeRecord:
    return EpisodeRecord(Episode(id, "g000001", Prompt("p", "calc", ()), (), Outcome.COMPLETED))


def trained(id: str, step: int) -> DispositionRecord:
    return DispositionRecord(id, "g000001", Disposition.TRAINED, step)


def excluded(id: str) -> DispositionRecord:
    return DispositionRecord(id, "g000001", Disposition.EXCLUDED, reason="infra_failure")


def test_a_run_without_a_resume() -> None:
    found = account(log(finished("a"), finished("b"), trained("a", 1), excluded("b")))
    assert found.complete
    assert found.surviving == {"a": (trained("a", 1),), "b": (excluded("b"),)}
    assert found.trained_at(1) == ("a",)
    assert found.abandoned == ()


def test_an_episode_in_the_buffer_is_undecided() -> None:
    found = account(log(finished("a"), finished("b"), trained("a", 1)))
    assert found.undecided == ("b",)
    assert found.sound
    assert not found.complete


def test_what_was_trained_after_the_checkpoint_is_void_until_trained_again() -> None:
    killed = [finished("a"), trained("a", 5), finished("b"), trained("b", 6), finished("c"), trained("c", 7)]
    resumed = account(log(*killed, ResumeRecord(5, 2)))
    assert resumed.undecided == ("b", "c")
    assert resumed.abandoned == (trained("b", 6), trained("c", 7))
    again = account(log(*killed, ResumeRecord(5, 2), trained("b", 6), trained("c", 7)))
    assert again.complete
    assert again.trained_at(6) == ("b",)


def test_exclusions_after_the_checkpoints_cursor_are_void_too() -> None:
    """They have no step, but the resumed run meets those episodes again and decides once more."""
    before = [finished("a"), excluded("a"), finished("b"), excluded("b"), ResumeRecord(5, 2)]
    assert account(log(*before)).undecided == ("b",)
    assert account(log(*before, excluded("b"))).complete
    assert account(log(*before, excluded("a"), excluded("b"))).decided_twice == ("a",)


def test_resuming_twice_from_the_same_checkpoint() -> None:
    found = account(
        log(
            finished("a"),
            trained("a", 6),
            ResumeRecord(5, 0),
            trained("a", 6),
            ResumeRecord(5, 0),
            trained("a", 6),
        )
    )
    assert found.complete
    assert found.abandoned == (trained("a", 6), trained("a", 6))


def test_resuming_from_an_older_checkpoint_voids_what_the_first_resume_did() -> None:
    found = account(
        log(finished("a"), trained("a", 5), finished("b"), ResumeRecord(5, 2), trained("b", 6), ResumeRecord(4, 0))
    )
    assert found.undecided == ("a", "b")


def test_training_again_what_the_checkpoint_already_holds_is_found() -> None:
    found = account(log(finished("a"), trained("a", 5), ResumeRecord(5, 2), trained("a", 6)))
    assert found.decided_twice == ("a",)
    assert not found.sound


def test_consuming_before_logging_is_found() -> None:
    reward = RewardRecord("a", Reward({}, {}))
    found = account(log(reward, finished("a"), trained("a", 1), trained("ghost", 1)))
    assert found.unlogged == ("a", "ghost")
    assert not found.sound


def test_logging_twice_is_found() -> None:
    assert account(log(finished("a"), finished("a"), trained("a", 1))).logged_twice == ("a",)


def test_episodes_of_an_evaluation_need_no_disposition() -> None:
    asked = EpisodeRecord(Episode("v1", "eval-000005", Prompt("p", "calc", ()), (), Outcome.COMPLETED))
    found = account(log(asked, asked, EvalRecord(5, Version(5), {"pass@1": 1.0}, ("v1",))))
    assert found.complete
