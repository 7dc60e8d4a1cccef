"""Fetch the files that the URLs of a table name, with few requests per server, and from public servers only."""

import asyncio
import atexit
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from fsspec.asyn import get_loop, sync

from mmbeam.errors import public_url
from mmbeam.readers.paths import FileError
from mmbeam.readers.retry import http_status, retry

PER_HOST = 4  # concurrent connections to one server
CONNECT_SECONDS, SILENT_SECONDS, TOTAL_SECONDS = 10.0, 20.0, 300.0
REDIRECTS = 5
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry; a server's Retry-After may make it longer
# Addresses of IPv6 whose last 32 bits are an address of IPv4: NAT64 (RFC 6052), and IPv4-compatible ones (RFC 4291).
_HOLD_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
AGENT = "mmbeam (dataset reader)"


def fetch(url: str, limit: int, allow_private: bool = False) -> bytes:
    """Return the content of an http(s) URL of at most `limit` bytes.

    At most PER_HOST requests to a server run at a time. Faults of the server and the network are retried as in
    `retry.retry`. A host name is resolved once per connection, and the connection goes to an address that was checked:
    unless `allow_private`, one that is not public (loopback, private, link-local) is refused, in redirects too.

    Raises FileError.
    """
    shown = public_url(url)
    if not url.lower().startswith(("http://", "https://")):
        raise FileError("DecodeError", f"{shown}: expected an http:// or https:// URL")
    try:
        get: Callable[[], bytes] = partial(sync, get_loop(), _get, url, limit, allow_private, timeout=TOTAL_SECONDS)
        return retry(get, shown, "cannot be fetched", waits=WAITS)
    except FileError:
        raise
    except Exception as error:  # of the client: any of them is a fault of this one file
        status = http_status(error)
        reason = f"status {status}" if status else " ".join(str(error).removeprefix(f"{shown}: ").split())
        raise FileError("ConnectionError", f"{shown}: {reason or type(error).__name__}") from None


async def _get(url: str, limit: int, allow_private: bool) -> bytes:
    for _ in range(REDIRECTS + 1):
        host = urlsplit(url).hostname or ""
        _check_literal(host, allow_private)
        async with _request(url, host, allow_private) as response:
            if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                url = urljoin(url, response.headers["Location"])
                if not url.lower().startswith(("http://", "https://")):
                    raise FileError("DecodeError", f"redirects to {public_url(url)}, which is not http:// or https://")
                continue
            response.raise_for_status()
            content = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                if len(content) > limit:
                    raise FileError("LimitError", f"has more than {limit:,} bytes (--max-member-bytes)")
            return bytes(content)
    raise FileError("ConnectionError", f"redirects more than {REDIRECTS} times")


@asynccontextmanager
async def _request(url: str, host: str, allow_private: bool) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a GET request without following redirects. Raises FileError for a host that does not exist."""
    try:
        async with _session(allow_private).get(url, allow_redirects=False) as response:
            yield response
    except aiohttp.ClientConnectorError as error:
        if getattr(error.os_error, "errno", None) in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None)):
            raise FileError("ConnectionError", f"{host}: no such host") from None
        raise


_sessions: dict[bool, aiohttp.ClientSession] = {}


def _session(allow_private: bool) -> aiohttp.ClientSession:
    """Return this process's client; called in fsspec's event loop only."""
    if allow_private not in _sessions or _sessions[allow_private].closed:
        connector = aiohttp.TCPConnector(
            limit_per_host=PER_HOST, resolver=_Resolver(allow_private), ttl_dns_cache=60, force_close=False
        )
        _sessions[allow_private] = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=TOTAL_SECONDS, connect=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
            ),
            headers={"User-Agent": AGENT},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
    return _sessions[allow_private]


@atexit.register
def close() -> None:
    """Close the connections of this process."""
    while _sessions:
        sync(get_loop(), _sessions.popitem()[1].close)


class _Resolver(AbstractResolver):
    """Resolves host names, and returns public addresses only."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Return the addresses of `host`. Raises FileError if one is not public, OSError if there is none."""
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        results: list[ResolveResult] = []
        for found_family, _, proto, _, address in infos:
            _check_address(host, str(address[0]), self._allow_private)
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=found_family,
                    proto=proto,
                    flags=socket.AI_NUMERICHOST,
                )
            )
        return results

    async def close(self) -> None:
        """Do nothing."""


def _check_literal(host: str, allow_private: bool) -> None:
    """Check a host that is an address, which the client does not resolve, in any spelling that a system accepts."""
    try:
        address = str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        try:
            address = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f000001, 2130706433
        except OSError:
            return
    _check_address(host, address, allow_private)


@cache
def _check_address(host: str, address: str, allow_private: bool) -> None:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if isinstance(ip, ipaddress.IPv6Address) and any(ip in network for network in _HOLD_IPV4):
        mapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if not allow_private and not ((mapped or ip).is_global and not (mapped or ip).is_multicast):
        raise FileError(
            "PermissionError",
            f"{host} is {address}, which is not a public address; if you trust the table, use --allow-local-paths",
        )
