"""Pictures from addresses that a client names: public ones only, or the server would open doors behind the firewall.

Each connection, that of a redirect too, resolves its host, refuses it unless all its addresses are public, and then
connects to the address that was checked, so that a second answer of the name server changes nothing.
"""

import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.request

from visualglm_hf.fetching import DOWNLOAD_TIMEOUT, download


class NotPublic(OSError):
    """The host has an address that is not public."""


class Deadline:
    """Ends all connections of one download after `seconds`: a timeout of sockets begins anew with each byte."""

    def __init__(self, seconds: float):
        self.sockets: list[socket.socket] = []
        self.has_passed = False
        self.timer = threading.Timer(seconds, self.pass_)
        self.timer.daemon = True

    def __enter__(self) -> "Deadline":
        self.timer.start()
        return self

    def __exit__(self, *error) -> None:
        self.timer.cancel()

    def pass_(self) -> None:
        self.has_passed = True
        for each in self.sockets:
            with contextlib.suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    def watch(self, connection: socket.socket) -> None:
        self.sockets.append(connection)
        if self.has_passed:
            raise TimeoutError("timed out")


class PublicHTTPConnection(http.client.HTTPConnection):
    def __init__(self, *args, deadline: Deadline, **kwargs):
        super().__init__(*args, **kwargs)
        self.deadline = deadline

    def connect(self) -> None:
        self.sock = connect_publicly(self.host, self.port, self.timeout)
        self.deadline.watch(self.sock)


class PublicHTTPSConnection(PublicHTTPConnection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        plain = connect_publicly(self.host, self.port, self.timeout)
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.deadline.watch(self.sock)
        self.sock.do_handshake()


class PublicHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline):
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: urllib.request.Request):
        return self.do_open(functools.partial(PublicHTTPConnection, deadline=self.deadline), request)

    def https_open(self, request: urllib.request.Request):
        return self.do_open(functools.partial(PublicHTTPSConnection, deadline=self.deadline), request)


def download_public(url: str, max_bytes: int, seconds: float = DOWNLOAD_TIMEOUT) -> bytes:
    """The bytes behind a public http(s) address.

    Raises:
        ValueError: another scheme, a host that is not public or does not answer, too many redirects, more than
            `max_bytes`, or more than `seconds` in all.
    """
    with Deadline(seconds) as deadline:
        opener = urllib.request.OpenerDirector()  # without handlers for proxies, files and ftp
        for handler in (
            PublicHandler(deadline),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        try:
            return download(url, opener.open, max_bytes)
        finally:
            if deadline.has_passed:  # what has come until then may look like the whole, or like any error
                raise ValueError(f"Cannot download the picture {url!r}: it took more than {seconds:g} s.")


def connect_publicly(host: str, port: int, timeout: float) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [address for *_, address in found]
    if not all(is_public(address[0]) for address in addresses):
        raise NotPublic(f"{host!r} is not a public address")
    return socket.create_connection(addresses[0][:2], timeout)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where IPv6 only wraps one of IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    is_tunnel = ip.version == 6 and ip.teredo is not None
    return ip.is_global and not ip.is_multicast and not is_tunnel
