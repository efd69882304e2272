"""Addresses of pictures: only where they are allowed, only public ones, however they are written or redirected."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from tests.paths import CIRCLES
from tests.serving_helpers import CAPTION, ask_about, post_chat, serve
from visualglm_tools.serving.http import public_urls


MAX_BYTES = 2**20


class PictureSite(http.server.BaseHTTPRequestHandler):
    """Serves a picture, redirects, a page that never ends, and one that is too slow."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"0")
                    self.wfile.flush()
                    time.sleep(0.1)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CIRCLES.read_bytes())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureSite) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_public_address_is_fetched_where_the_server_allows_it(engine, site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")  # this machine plays the net
    with serve(engine, allow_urls=True) as url:
        for address in (f"{site}/a.png", f"{site}/to/{site}/a.png"):
            response = post_chat(url, messages=ask_about(address), temperature=0, repetition_penalty=1)
            assert response.json()["choices"][0]["message"]["content"] == CAPTION


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png",
        "http://localhost:8080/a.png",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0.0.0.0/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "https://127.0.0.1/a.png",
    ],
)
def test_an_address_that_is_not_public_is_refused(engine, address):
    with pytest.raises(ValueError, match="is not a public address"):
        public_urls.download_public(address, MAX_BYTES)


def test_redirects_are_checked_again(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(ValueError, match=r"'127\.0\.0\.2' is not a public address"):
        public_urls.download_public(f"{site}/to/http://127.0.0.2/a.png", MAX_BYTES)
    with pytest.raises(ValueError, match="Cannot download"):
        public_urls.download_public(f"{site}/to/file:///etc/passwd", MAX_BYTES)
    with pytest.raises(ValueError, match="Cannot download"):
        public_urls.download_public(f"{site}/to/ftp://127.0.0.1/a.png", MAX_BYTES)


def test_the_address_that_was_checked_is_the_one_connected_to(site, monkeypatch):
    """A name that is public when it is checked and private a moment later (DNS rebinding) gains nothing."""
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    port = int(site.rsplit(":", 1)[1])
    original = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **keywords):
        if host != "rebinding.example":
            return original(host, *arguments, **keywords)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
    assert public_urls.download_public(f"http://rebinding.example:{port}/a.png", MAX_BYTES) == CIRCLES.read_bytes()
    assert answers == [["127.0.0.2"]]


def test_a_host_with_one_private_address_is_refused_whole(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *arguments, **keywords: [(2, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")],
    )
    with pytest.raises(ValueError, match="not a public address"):
        public_urls.download_public("http://two-faced.example/", MAX_BYTES)


def test_a_picture_of_too_many_bytes_is_not_read_to_its_end(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: True)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        public_urls.download_public(f"{site}/a.png", 1000)


def test_a_slow_picture_is_given_up(site, monkeypatch):
    monkeypatch.setattr(public_urls, "is_public", lambda address: True)
    with pytest.raises(ValueError, match=r"took more than 0\.5 s"):
        public_urls.download_public(f"{site}/slow", MAX_BYTES, seconds=0.5)
