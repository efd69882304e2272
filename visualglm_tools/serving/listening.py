"""Where a server listens: taken before the model is loaded, so that nothing is loaded in vain.

Not here: what is served there, and under which names (`http/guards.py`).
"""

import ipaddress
import os
import socket
import sys


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses of `host`, at any free port if `port` is 0; a `ValueError` if there can be none."""
    sockets = []
    try:
        for family, kind, protocol, _, (address, _, *more) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sockets.append(socket.socket(family, kind, protocol))
            if os.name == "posix":  # elsewhere it lets two servers have one port
                sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[-1].bind((address, port, *more))
            sockets[-1].listen()  # or another server could bind the same port
            port = port or sockets[0].getsockname()[1]  # the same for all addresses
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with an empty or an overlong part
        close(sockets)
        raise ValueError(f"cannot listen at {host!r}, port {port}: {error}. Give another --host or --port.") from error
    return sockets


def find_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, for a server that opens its sockets itself; the `ValueError` of `listen`."""
    sockets = listen(host, port)
    found = sockets[0].getsockname()[1]
    close(sockets)
    return found


def address_of(listener: socket.socket) -> str:
    """As people type it into a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def tell_openness(host: str, what_is_missing: str) -> None:
    """Say that strangers may ask where `host` is not this machine's alone, and what is missing to keep them out."""
    addresses = {address[0] for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        print(f"Whoever reaches this machine may ask: {what_is_missing}", file=sys.stderr)


def close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
