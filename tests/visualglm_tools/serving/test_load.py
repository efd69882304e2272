"""Many clients at a time, as they behave: text, pictures, streams, and leaving early. Each answer is the answer alone.

The long version is marked slow and takes VISUALGLM_LOAD_SECONDS (600) seconds; it prints its figures as one JSON line.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.commands import SECONDS
from tests.hostile_bodies import HOSTILE, JSON
from tests.paths import PICTURES
from tests.serving_helpers import MODEL, data_uri, get, health, is_idle, open_door, wait_until
from visualglm_tools.serving.engine.answers import Limits


LOAD_SECONDS = float(os.environ.get("VISUALGLM_LOAD_SECONDS", "600"))
CLIENTS = 32
CAPACITY = Limits().max_batch_size + Limits().max_waiting
WARM_UP = 0.2  # of the time, after which memory must not grow
MAX_GROWTH = 0.05
MIN_SPEED_UP = 3  # of 8 clients over one


def chat_requests() -> list[dict]:
    """Bodies of `/v1/chat/completions`: with and without pictures, greedy and sampled, short and long."""
    questions = {
        "zh": ["描述这张图片。", "图里有什么颜色？"],
        "en": ["Describe the image.", "How many shapes are there?"],
    }
    pictures = [None, *(data_uri(path.read_bytes()) for path in PICTURES)]
    settings = [
        {"temperature": 0, "repetition_penalty": 1},
        {"seed": 1},
        {"seed": 2, "temperature": 1.5, "top_p": 1, "min_tokens": 40, "max_tokens": 60},
        {"temperature": 0, "min_tokens": 60, "stop": ["夜", "sand"]},
    ]
    bodies = []
    for question, picture, options in itertools.product(sum(questions.values(), []), pictures, settings):
        content = [{"type": "text", "text": question}]
        if picture:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
        bodies.append({"model": MODEL, "messages": [{"role": "user", "content": content}], **options})
    return bodies


FEW = chat_requests()[::5]  # 5 and the 4 settings have no common divisor: all kinds are among them


@dataclass
class Tally:
    """What the clients have seen."""

    answers: int = 0
    left_early: int = 0
    tokens: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    hostile: int = 0
    seconds: list[float] = field(default_factory=list)

    def compare(self, found: str, expected: str) -> None:
        self.answers += 1
        if found != expected:
            self.wrong.append((found, expected))


class Clients:
    """Clients of one server; they know the answers that each request gets alone."""

    def __init__(self, url: str, requests: list[dict]):
        self.requests = requests
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))
        self.alone: list[tuple[dict, str]] = []

    async def __aenter__(self) -> "Clients":
        for body in self.requests:
            response = await self.http.post("/v1/chat/completions", json=body)
            self.alone.append((body, response.json()["choices"][0]["message"]["content"]))
        return self

    async def __aexit__(self, *error) -> None:
        await self.http.aclose()

    async def ask(self, tally: Tally, body: dict, expected: str) -> None:
        started = time.monotonic()
        response = await self.http.post("/v1/chat/completions", json=body)
        seconds = time.monotonic() - started
        if response.status_code == 429:
            tally.refused_after.append(seconds)
            return
        answer = response.json()
        tally.seconds.append(seconds)
        tally.tokens += answer["usage"]["completion_tokens"]
        tally.compare(answer["choices"][0]["message"]["content"], expected)

    async def stream(self, tally: Tally, body: dict, expected: str, leave_after: int | None = None) -> None:
        """Read a stream, perhaps only its first pieces; they must be the beginning of the answer."""
        text, pieces = "", 0
        body = {**body, "stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
                    pieces += 1
                if leave_after is not None and pieces >= leave_after:
                    tally.left_early += 1
                    tally.compare(text, expected[: len(text)])
                    return
        tally.compare(text, expected)

    async def leave(self, tally: Tally, body: dict, expected: str) -> None:
        """Ask, and leave before the whole answer is there."""
        try:
            await asyncio.wait_for(self.ask(Tally(), body, expected), 0.05)
        except TimeoutError:
            tally.left_early += 1

    async def behave(self, tally: Tally, seed: int, turns: Iterable) -> None:
        """One client, again and again."""
        choice = random.Random(seed)
        for _ in turns:
            request = choice.choice(self.alone)
            kind = choice.random()
            if kind < 0.5:
                await self.ask(tally, *request)
            elif kind < 0.8:
                await self.stream(tally, *request)
            elif kind < 0.9:
                await self.stream(tally, *request, leave_after=choice.randrange(1, 5))
            else:
                await self.leave(tally, *request)

    async def attack(self, tally: Tally, turns: Iterable) -> None:
        """One client that sends what costs much for nothing, one after the other."""
        for _, (path, body, expected) in zip(turns, itertools.cycle(HOSTILE.values()), strict=False):
            response = await self.http.post(path, content=body(), headers=JSON)
            allowed = expected if isinstance(expected, tuple) else (expected,)
            assert response.status_code in (*allowed, 429), (path, response.status_code, response.text[:300])
            tally.hostile += 1

    async def work(self, tally: Tally, seed: int, deadline: float) -> None:
        """One client that asks one question after the other; all clients ask the same in different order."""
        requests = list(self.alone)
        random.Random(seed).shuffle(requests)
        for request in itertools.cycle(requests):
            if time.monotonic() > deadline:
                return
            await self.ask(tally, *request)

    async def throughput(self, clients: int, seconds: float) -> float:
        """Tokens per second of several clients."""
        tally, started = Tally(), time.monotonic()
        await asyncio.gather(*(self.work(tally, seed, started + seconds) for seed in range(clients)))
        assert not tally.wrong, tally.wrong[:3]
        return tally.tokens / (time.monotonic() - started)

    async def speed_up(self, seconds: float) -> dict:
        """One client and eight by turns, since other work on the machine comes and goes."""
        turns = [[await self.throughput(clients, seconds / 10) for clients in (1, 8)] for _ in range(5)]
        one, eight = (statistics.median(speeds) for speeds in zip(*turns, strict=True))
        return {
            "tokens/s of 1 client": round(one),
            "tokens/s of 8 clients": round(eight),
            "speed-up": round(statistics.median(many / single for single, many in turns), 2),
        }

    async def refusals(self) -> dict:
        """How long a refusal takes while the queue is full."""
        body = {**self.requests[0], "min_tokens": 1500}
        crowd = [asyncio.create_task(self.http.post("/v1/chat/completions", json=body)) for _ in range(CAPACITY)]
        while gauge(await self.http.get("/metrics"), "visualglm_queue_length") < Limits().max_waiting:
            await asyncio.sleep(0.1)
        tally = Tally()
        for body, expected in itertools.islice(itertools.cycle(self.alone), 20):
            await self.ask(tally, body, expected)
        for task in crowd:
            task.cancel()
        assert len(tally.refused_after) == 20
        return {
            "refusal, median [ms]": round(statistics.median(tally.refused_after) * 1000),
            "refusal, slowest [ms]": round(max(tally.refused_after) * 1000),
        }

    async def burst(self, requests: int, go_on: Callable[[], None]) -> Tally:
        """All at once, to a server that answers none until it goes on: when all that it has no room for are refused."""
        tally, turns = Tally(), itertools.cycle(self.alone)
        asking = [asyncio.create_task(self.ask(tally, *next(turns))) for _ in range(requests)]
        refused = itertools.islice(asyncio.as_completed(asking), requests - CAPACITY)
        for each in refused:
            await each
        go_on()
        await asyncio.gather(*asking)
        return tally


def until(deadline: float) -> Iterator[None]:
    """Again and again until then, by `time.monotonic`."""
    while time.monotonic() < deadline:
        yield


async def load(url: str, requests: list[dict], seconds: float, process: psutil.Process) -> dict:
    """Let the clients behave for `seconds`; returns the figures."""
    tally, memory = Tally(), []
    async with Clients(url, requests) as crowd:
        started = time.monotonic()
        deadline = started + seconds

        async def watch_memory():
            while time.monotonic() < deadline:
                memory.append((time.monotonic() - started, process.memory_info().rss))
                await asyncio.sleep(min(1, seconds / 50))

        behaving = [crowd.behave(tally, seed, until(deadline)) for seed in range(CLIENTS)]
        await asyncio.gather(*behaving, crowd.attack(tally, until(deadline)), watch_memory())
    figures = {
        "clients": CLIENTS,
        "seconds": round(time.monotonic() - started),
        "answers compared": tally.answers,
        "wrong answers": len(tally.wrong),
        "left early": tally.left_early,
        "refused": len(tally.refused_after),
        "hostile bodies": tally.hostile,
    }
    warm = [rss for moment, rss in memory if moment >= seconds * WARM_UP]
    # The mean of a tenth of the samples: single ones go up and down with the pictures in flight.
    few = max(1, len(warm) // 10)
    first, last = sum(warm[:few]) / few, sum(warm[-few:]) / few
    figures |= {"MiB after warm-up": round(first / 2**20), "MiB at the end": round(last / 2**20)}
    figures["growth"] = round(last / first - 1, 4)
    assert not tally.wrong, tally.wrong[:3]
    return figures


def gauge(metrics: httpx.Response, name: str) -> float:
    return float(next(line for line in metrics.text.splitlines() if line.startswith(f"{name} ")).split()[1])


async def few_turns(url: str) -> Tally:
    tally = Tally()
    async with Clients(url, FEW) as crowd:
        await asyncio.gather(*(crowd.behave(tally, seed, range(3)) for seed in range(CLIENTS)))
    return tally


def test_a_crowd_gets_the_answers_that_each_would_get_alone(engine, url):
    tally = asyncio.run(few_turns(url))
    assert tally.answers > CLIENTS and tally.left_early > 0 and not tally.wrong, tally.wrong[:3]
    wait_until(lambda: is_idle(engine))


def test_a_burst_beyond_the_queue_is_refused_at_once_and_the_rest_is_answered(loaded, url, monkeypatch):
    head, goes_on = loaded[0].lm_head, threading.Event()
    forward = head.forward

    async def burst() -> Tally:
        async with Clients(url, FEW) as crowd:
            monkeypatch.setattr(head, "forward", lambda states: goes_on.wait(SECONDS) and forward(states))
            return await crowd.burst(CAPACITY + 40, goes_on.set)

    try:
        tally = asyncio.run(burst())
    finally:
        goes_on.set()
    assert (tally.answers, len(tally.refused_after)) == (CAPACITY, 40)
    assert not tally.wrong, tally.wrong[:3]


def server_is_idle(url: str) -> bool:
    metrics = get(f"{url}/metrics")
    return gauge(metrics, "visualglm_running") == gauge(metrics, "visualglm_queue_length") == 0


@pytest.mark.slow
def test_the_server_stands_a_long_load():
    async def measure(url: str, process: psutil.Process) -> dict:
        figures = await load(url, chat_requests(), LOAD_SECONDS, process)
        async with Clients(url, FEW) as crowd:
            return figures | await crowd.refusals()

    with open_door("--dtype", "float32") as (url, process, log):
        wait_until(lambda: health(url) == 200)
        figures = asyncio.run(measure(url, psutil.Process(process.pid)))
        wait_until(lambda: server_is_idle(url))
        written = log.read_text(encoding="utf-8")
        assert "Traceback" not in written, written[written.index("Traceback") - 300 :][:3000]
    print("\n" + json.dumps(figures))
    assert figures["growth"] < MAX_GROWTH
    assert figures["refusal, slowest [ms]"] < 1000


@pytest.mark.slow
def test_eight_clients_get_three_times_as_much_as_one():
    # Of the length of a description by the real model. Needs two cores of its own: clients and server share them.
    long_requests = [{**body, "min_tokens": 100, "max_tokens": 100, "stop": []} for body in FEW]

    async def measure(url: str) -> dict:
        async with Clients(url, long_requests) as crowd:
            return await crowd.speed_up(min(100, LOAD_SECONDS))

    with open_door("--dtype", "float32") as (url, *_):
        wait_until(lambda: health(url) == 200)
        figures = asyncio.run(measure(url))
    print("\n" + json.dumps(figures))
    assert figures["speed-up"] >= MIN_SPEED_UP
