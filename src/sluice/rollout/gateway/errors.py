"""What a session refuses, with the HTTP status that says so."""

from __future__ import annotations

from sluice.errors import SluiceError


class SessionError(SluiceError):
    """A call that a session cannot serve. Nothing was sampled, nothing was recorded.

    Attributes:
        status: HTTP status.
        code: a stable machine-readable word, OpenAI's where it has one.
        retry_after: seconds to wait, for 429.
    """

    status = 400
    code = "invalid_request_error"
    retry_after: int | None = None


class UnknownSession(SessionError):  # noqa: N818 - the state is the name
    """No such session, or a key that opens none."""

    status = 404
    code = "session_not_found"


class UnknownTask(SessionError):  # noqa: N818
    """No prompt of this task or group, now or later."""

    status = 404
    code = "task_not_found"


class BadRequest(SessionError):  # noqa: N818
    """A body that cannot be used as it is.

    Args:
        param: the field at fault, as OpenAI names it in errors.
    """

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class BodyTooLarge(SessionError):  # noqa: N818
    """More bytes than `body_bytes`."""

    status = 413
    code = "request_too_large"


class BadKey(SessionError):  # noqa: N818
    """No key, a wrong one, or one that is not good for this."""

    status = 401
    code = "invalid_api_key"


class NotAllowed(SessionError):  # noqa: N818
    """A session key where the owner's is needed, or another session's."""

    status = 403
    code = "permission_denied"


class SessionClosed(SessionError):  # noqa: N818
    """The session was finished or has expired."""

    status = 410
    code = "session_closed"


class HistoryMismatch(SessionError):  # noqa: N818
    """The history that was sent is not the one that was recorded, and config says to fail."""

    status = 409
    code = "history_mismatch"


class SessionFull(SessionError):  # noqa: N818
    """The session has had all the calls or segments that it may have."""

    status = 409
    code = "session_full"


class SamplingPinned(SessionError):  # noqa: N818
    """Another temperature, top-p or the like than the session's."""

    status = 400
    code = "sampling_pinned"


class ContextOverflow(SessionError):  # noqa: N818
    """The history leaves no room for an answer."""

    status = 400
    code = "context_length_exceeded"


class Busy(SessionError):  # noqa: N818
    """Nothing to lease now, or too many sessions: come back later."""

    status = 429
    code = "rate_limit_exceeded"
