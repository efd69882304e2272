"""Where servers listen: a port that can be had is had, and one that cannot is refused in words."""

import socket

import pytest

from visualglm_tools.serving.listening import find_port, listen, tell_openness


def test_a_port_that_was_found_is_free_again():
    port = find_port("127.0.0.1", 0)
    assert port > 0 and find_port("127.0.0.1", port) == port
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("host", ["300.1.1.1", "no such host", "a" * 300, ".."])
def test_a_host_that_is_none_is_refused_in_words(host):
    with pytest.raises(ValueError, match="Give another --host or --port"):
        find_port(host, 0)


def test_a_taken_port_is_refused_and_nothing_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for take in (listen, find_port):
            with pytest.raises(ValueError, match=f"cannot listen at '127.0.0.1', port {port}: "):
                take("127.0.0.1", port)
    assert find_port("127.0.0.1", port) == port


def test_of_two_servers_that_start_at_once_the_second_is_refused():
    """Sockets that are bound and do not listen yet could share a port."""
    (first,) = listen("127.0.0.1", 0)
    with first, pytest.raises(ValueError, match="cannot listen"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("127.8.0.1", False), ("localhost", False), ("0.0.0.0", True), ("192.0.2.7", True)],
)
def test_that_strangers_may_ask_is_said_where_they_reach_the_server(host, is_open, capsys):
    tell_openness(host, "there is no key.")
    said = "Whoever reaches this machine may ask: there is no key.\n" if is_open else ""
    assert capsys.readouterr().err == said
