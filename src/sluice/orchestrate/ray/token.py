"""Whether this process shows Ray's token, and asks those who call it for it: one switch for both, of the whole process.

A driver that asks a cluster without a token for one turns its calls away. The cluster takes the driver for dead and
ends its actors before they run: "all references to the actor were removed".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

_RAY: Any = ray._raylet  # pyright: ignore[reportAttributeAccessIssue]  (compiled, and without types)

VARIABLE = "RAY_AUTH_MODE"


def asked() -> bool:
    """Whether this process shows and asks for a token."""
    mode = getattr(_RAY, "get_authentication_mode", None)  # older Ray knows no token
    return mode is not None and mode() == _RAY.AuthenticationMode.TOKEN


@contextmanager
def as_it_was() -> Iterator[None]:
    """Afterwards the switch is where it was: Ray turns it on for good when it starts a local cluster."""
    before = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        if os.environ.get(VARIABLE) != before:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
            reread()


def reread() -> None:
    """Have Ray read the variable, and the token, again. It keeps both, the token even where none is asked for."""
    _RAY.Config.initialize("")
    _RAY.AuthenticationTokenLoader.instance().reset_cache()
