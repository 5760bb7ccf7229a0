"""Which cluster may be talked to, and how Ray shows it a token. Imports no torch and no Ray, which reads its settings
from the environment while it is imported."""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from cuboid.parallel.errors import UserError

_PATIENCE_SECONDS = 10
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray would follow in place of the address that it is given."""


def settle_access(address: str, *, insecure: bool) -> str:
    """The cluster's URL, once it is known to be one that may be used; Ray's environment then says how.

    Raises:
        UserError: it is no URL of a job API; nobody answers; it wants a token and there is none; it lets in anyone on
            the network, and ``insecure`` was not asked for.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
        words = "is not the URL of a Ray cluster's job API"
        raise UserError(f"--address {redacted(address)} {words}; use http://HOST:8265, as `ray dashboard` shows it")
    address = address.rstrip("/")
    if _wants_a_token(address):
        _check_token(address)
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # a token is not shown to a cluster that does not ask for it
        if not insecure and not _is_loopback(url.hostname):
            reason = "has no token authentication, and its job API runs code for anyone who reaches it"
            remedy = (
                "start it with RAY_AUTH_MODE=token, or bind it to 127.0.0.1 and use a tunnel (ssh -L "
                "8265:localhost:8265 HOST), or give --insecure where the network is trusted"
            )
            raise UserError(f"the cluster at {address} {reason}; {remedy}")
    for name in _OTHER_ADDRESSES:
        os.environ.pop(name, None)
    return address


def redacted(address: str) -> str:
    """Without a user's name and password."""
    scheme, slashes, rest = address.rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"


def _wants_a_token(address: str) -> bool:
    """Whether the job API refuses who shows none."""
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=_PATIENCE_SECONDS):
            return False
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return True
        cause = f"its answer is {error.code} {error.reason}"
    except OSError as error:  # URLError is one
        cause = str(getattr(error, "reason", error))
    raise UserError(f"no Ray job API answers at {address}: {cause}")


def _check_token(address: str) -> None:
    """Raises UserError where the environment has no token; Ray itself would abort over a file that it cannot read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    place = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not place:
        remedy = "set RAY_AUTH_TOKEN_PATH to a file that holds it and that only you can read"
        raise UserError(f"the cluster at {address} asks for a token, and the environment has none; {remedy}")
    try:
        fault = "" if Path(place).read_bytes().strip() else "is empty"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if fault:
        raise UserError(f"RAY_AUTH_TOKEN_PATH={place} {fault}; the cluster at {address} asks for a token")


def _is_loopback(host: str) -> bool:
    found = socket.getaddrinfo(host, None)
    return all(ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in found)
