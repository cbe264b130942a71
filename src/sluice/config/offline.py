"""`offline = true`: which hosts a configuration makes a run talk to, and which of them are not allowed.

Found are the fields of an address type (`sluice.config.base`), the hosts that a part declares itself
(`Part.hosts`), and any `scheme://host` inside a word: arguments, environment variables, parameters. What a
function or an agent of the user's own connects to cannot be seen here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from typing import Any, cast

from sluice.config.base import AddressText, Part

_URL_IN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#'\",;]+")


def refusals(config: Part, allowed: Sequence[str]) -> list[str]:
    """`rewards.0.url reaches judge.example.com` for every host that is neither this machine nor allowed."""
    found = [f"{key} reaches {host}" for key, host in hosts(config) if not _is_local(host) and not _may(host, allowed)]
    return list(dict.fromkeys(found))


def hosts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key that names a host, with the host."""
    if isinstance(value, Part):
        yield from ((key, host) for host in value.hosts())
        for name in type(value).model_fields:
            yield from hosts(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, AddressText):
        yield key, value.host
    elif isinstance(value, str):
        for found in _URL_IN_WORD.findall(value) if not any(map(str.isspace, value)) else ():
            yield key, _host(found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("Sequence[Any]", value)):
            yield from hosts(item, f"{key}.{index}")
    elif isinstance(value, dict):
        for name, item in cast("dict[str, Any]", value).items():
            yield from hosts(item, f"{key}.{name}")


def _host(url: str) -> str:
    try:
        return AddressText(url).host
    except ValueError:  # no address that could be told apart, so none that could be allowed
        return url


def _is_local(host: str) -> bool:
    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _may(host: str, allowed: Sequence[str]) -> bool:
    return any(_matches(host, rule.lower().rstrip(".")) for rule in allowed)


def _matches(host: str, rule: str) -> bool:
    if host == rule or (rule.startswith("*.") and host.endswith(rule[1:])):
        return True
    try:
        return ip_address(host) in ip_network(rule)
    except ValueError:
        return False
