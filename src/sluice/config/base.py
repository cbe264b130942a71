"""What every part of the configuration has in common: frozen, unknown keys are errors, addresses are typed."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict


class Part(BaseModel):
    """One part of a run's configuration. Immutable; a part is handed its own object, never the whole run."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def hosts(self) -> tuple[str, ...]:
        """Hosts that this part makes a run talk to and that none of its addresses names: a service's default."""
        return ()


class AddressText(str):
    """A validated address: what `offline` looks for in a configuration. Fields have the types below."""

    __slots__ = ()

    @property
    def host(self) -> str:
        """The host it names, in lower case and without port."""
        parts = urlsplit(self if "://" in self else f"//{self}")
        return (parts.hostname or "").rstrip(".")


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(character.isspace() for character in value):
        raise ValueError(f"{value!r} is no URL (http://host:port or https://host/path)")
    if "@" in urlsplit(value).netloc:
        raise ValueError("a URL with a user or password in it would be written to the run folder; leave them out")
    return AddressText(value)


def _url_or_name(value: str) -> str:
    return _url(value) if "://" in value else value


def _address_or_empty(value: str) -> str:
    address = AddressText(value)
    try:
        usable = not value or (bool(address.host) and urlsplit(f"//{value}").port is not None)
    except ValueError:
        usable = False
    if not usable or "/" in value:
        raise ValueError(f"{value!r} is no address (host:port)")
    return address if value else value


def _cluster_address(value: str) -> str:
    if value in ("", "auto"):
        return value
    _address_or_empty(value.removeprefix("ray://"))
    return AddressText(value)


Url = Annotated[str, AfterValidator(_url)]
"""An http or https URL. Every field that holds one has this type (`Url | None`, `tuple[Url, ...]`), so that
`offline` finds it."""
UrlOrName = Annotated[str, AfterValidator(_url_or_name)]
"""A URL, or one of the field's own words."""
OptionalAddress = Annotated[str, AfterValidator(_address_or_empty)]
"""`host:port` of another process, or empty."""
ClusterAddress = Annotated[str, AfterValidator(_cluster_address)]
"""A Ray cluster: `auto`, `host:port`, `ray://host:port`, or empty."""
ADDRESS_TYPES = frozenset({_url, _url_or_name, _address_or_empty, _cluster_address})
"""The validators that mark a field as an address."""
