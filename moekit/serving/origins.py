"""Whom a server answers: requests by its own name, and from its own page."""

from __future__ import annotations

import ipaddress
from email.message import Message
from urllib.parse import urlsplit

from moekit.serving.requests import RefusedError


def require_own_host(hosts: list[str], listening: str) -> None:
    """Make sure that a request was sent to this server by a name of its own.

    A page of another site can give its own name the address of this machine (DNS rebinding). It cannot do so with an
    address or with ``localhost``.

    Args:
        hosts: the Host headers of the request.
        listening: the name that the server was told to listen on.

    Raises:
        RefusedError: 400 without a host or with several, 403 for another.
    """
    if len(hosts) != 1:
        raise RefusedError(400, f"a request must have one Host header: got {len(hosts)}.")
    name = _name(hosts[0])
    if name is None:
        raise RefusedError(400, "the Host header must be a name or an address, and a port.")
    if name == listening.lower() or name == "localhost" or name.endswith(".localhost") or _is_address(name):
        return
    raise RefusedError(403, "the Host header must be this server's: use its address, or localhost.")


def require_same_origin(headers: Message[str, str]) -> None:
    """Make sure that a browser sends a request for this server's own page, if it is a browser.

    Raises:
        RefusedError: 403 for another page.
    """
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site", "same-origin")
    if origin is not None:
        try:
            asking = urlsplit(origin).netloc.lower()
        except ValueError:
            asking = ""
        if asking != headers.get("Host", "").lower():
            raise RefusedError(403, "a page of another origin may not ask this server.")
    if site not in ("same-origin", "none"):
        raise RefusedError(403, "a page of another site may not ask this server.")


def _name(host: str) -> str | None:
    """The name of a Host header without its port; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return None if parts.netloc != host or "@" in host else parts.hostname


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
