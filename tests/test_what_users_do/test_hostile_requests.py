"""Whatever one client sends, the others get their answers, as they are and about as soon, and the memory stays."""

import asyncio
import base64
import json
import statistics
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

from tests.paths import PICTURES
from tests.picture_files import png_of_zeros
from tests.serving_helpers import (
    HELLO,
    MODEL,
    answer_of,
    ask_about,
    data_uri,
    health,
    nested_schema,
    open_door,
    post,
    post_chat,
    wait_until,
)
from visualglm_tools.serving.http import intake
from visualglm_tools.serving.http.errors import ApiError
from visualglm_tools.serving.http.legacy_api import LegacyRequest
from visualglm_tools.serving.http.service import check_address


MIB = 2**20
MOST_GROWTH = 300 * MIB
MOST_PATIENCE = 30  # times as long as a usual answer of the neighbour's: 8 were seen, and 100 to 300 before
JSON = {"Content-Type": "application/json"}
CHAT, LEGACY = "/v1/chat/completions", "/"
COMPLETIONS, RESPONSES, TOKENIZE = "/v1/completions", "/v1/responses", "/tokenize"
# 8192 x 8192 pixels each, deflated: in one process decoding takes up to 16 s and 1.5 GB.
JPEG_2000 = """
c-muNVBpCLP*C9IYUg5LU=T?wsVvAUFj4@r8KAT-kj?<oVwo8!MGOoeAs}XEX9uZa;7`uaDPjaO1sE8Z{s0vx|M&kN$e_=_09OnLXnbaNMn(wwAH=`|6ku
dvWnp1p{2#+0?BL+x5rB;Tr!c58Fgh2dCYGe8C?r)X_!p$+c?Gz-E0m=c6=&w>DH!RQ>Y4nXzyR_I15+u`oXOvRu+}rI2NMrO|1j-u2>-zK-$5HFa6lVLG
(a#QWc~m8mz@dqgOfGtkHN)iKn4GA0s!t~WyA"""
AVIF = """
c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xy^nKdYzkElE?r7iWw<6MNl?FL1uCZ0~+8f$SlbPvlxL`E;A=T8N_h`@fjhajKT~I%)CIhMrLMS8eFXukdw
*;<t3IG7&_<Y<b&<X$}A`<0Mg!>1<Cn9S|qc$AQfVr0u(a{6l7Lpf*8yk92`K3C$Y@Xxlx`6BqW@ipHq~VoKpcbnU{gB0VpJ%S&$3!6VPESj7-feK)s^5D
TyUQ3|!pupY8wu|JK2gVWMF4n^nT)czata6Nkb)N1*zs^XCHBYCe&=bu>XS-r&uOGX<JwCoI(T`mf2x*RseetN8-Q184J80qv%UbDPheKJ{&e?FVfKBeQv
LFBi|@@h`GibLU~5;q*f(ucsvO1+7;982h2cO#B?%+IVq=nDgf%%9%btuM2UXaoy44?zM#*wX9p0f820?VQktggQkCR&sk&NY_xhdBRu<_P6Eg0IfsPh+F
r}Px6^gme_hqGm&5nK@!M(1`Yk7~YaEeT8s`6K_d|{x{W-i*`}7<}O&^Y?)6{SP3E{10"""


@pytest.fixture(scope="module")
def server():
    """The door in a process of its own, ready, with its decoders started by a first picture."""
    with open_door() as (url, process, _):
        wait_until(lambda: health(url) == 200)
        post_chat(url, messages=ask_about(data_uri(PICTURES[0].read_bytes())))
        yield url, psutil.Process(process.pid)


class Neighbour:
    """Another client, who asks and asks, about pictures too; how long each answer took, and what it was."""

    QUESTIONS = ([HELLO], ask_about(data_uri(PICTURES[0].read_bytes())))

    def __init__(self, url: str):
        self.url = url
        self.answers: list[str] = []
        self.seconds: list[float] = []
        self.is_done = threading.Event()

    def answer(self, messages: list[dict]) -> str:
        return answer_of(post_chat(self.url, messages=messages, temperature=0, repetition_penalty=1))

    def ask_once(self) -> None:
        begin = time.monotonic()
        self.answers.append("\n".join(self.answer(messages) for messages in self.QUESTIONS))
        self.seconds.append(time.monotonic() - begin)

    def ask_until_done(self) -> None:
        while not self.is_done.is_set():
            self.ask_once()


class MemoryWatch:
    """The most that a process and its children take while it runs, beyond what they took before."""

    def __init__(self, process: psutil.Process):
        self.process = process
        self.before = self.most = self.now()
        self.is_done = threading.Event()

    def now(self) -> int:
        total = 0
        for each in [self.process, *self.process.children(recursive=True)]:
            try:
                memory = each.memory_info().rss
            except psutil.Error:  # it has just ended
                continue
            # Between fork and exec a child shows its parent's memory.
            total += memory if each is self.process or memory < self.process.memory_info().rss else 0
        return total

    def watch(self) -> None:
        while not self.is_done.wait(0.02):
            self.most = max(self.most, self.now())


def json_bytes(**fields) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def chat_body(content, **fields) -> bytes:
    return json_bytes(model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=1, **fields)


def schema_body(schema: dict) -> bytes:
    return chat_body("a", response_format={"type": "json_schema", "json_schema": {"schema": schema}})


def uri_body(uri: str) -> bytes:
    return chat_body([{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "?"}])


def unpacked(text: str) -> str:
    return "data:;base64," + base64.b64encode(zlib.decompress(base64.b85decode(text.replace("\n", "")))).decode()


@pytest.fixture(scope="module")
def alone(server):
    """What the neighbour gets, and how soon, while nobody else asks."""
    neighbour = Neighbour(server[0])
    for _ in range(7):
        neighbour.ask_once()
    return neighbour


MANY = 500_000
HOSTILE = {
    "messages of nothing": (CHAT, lambda: json_bytes(model="m", messages=[{}] * MANY), 413),
    "fewer messages": (CHAT, lambda: json_bytes(model="m", messages=[{}] * 40_000), 422),
    "messages of one word": (
        CHAT,
        lambda: json_bytes(model=MODEL, messages=[{"role": "user", "content": "a"}] * 40_000),
        422,
    ),
    "parts of nothing": (CHAT, lambda: chat_body([{}] * MANY), 413),
    "parts of one word": (CHAT, lambda: chat_body([{"type": "text", "text": "a"}] * 2000), (200, 400)),
    "many pictures": (CHAT, lambda: chat_body([{"type": "image_url", "image_url": {"url": "data:,"}}] * 2000), 400),
    "history of nothing": (LEGACY, lambda: json_bytes(text="a", history=[[]] * MANY), 413),
    "history of words": (LEGACY, lambda: json_bytes(text="a", history=[["b", "c"]] * 40_000), 422),
    "stops": (CHAT, lambda: chat_body("a", stop=["a"] * 100_000), 422),
    "fields": (CHAT, lambda: json_bytes(**{f"x{index}": 1 for index in range(100_000)}), 422),
    "metadata": (CHAT, lambda: chat_body("a", metadata={str(index): [] for index in range(50_000)}), 422),
    "a long text": (CHAT, lambda: chat_body("好" * 5_000_000), 400),
    "a long text of blanks": (LEGACY, lambda: json_bytes(text=" a" * 2_500_000), 400),
    "many long texts": (
        CHAT,
        lambda: json_bytes(model=MODEL, messages=[{"role": "user", "content": "a" * 5000}] * 1000, max_tokens=1),
        400,
    ),
    "a text that may just fit": (CHAT, lambda: chat_body(" " * 150_000 + "a"), (200, 400)),
    "a text of marks": (LEGACY, lambda: json_bytes(text="[gMASK]<sop>" * 13_000), 400),
    "a long name": (CHAT, lambda: json_bytes(model="m" * 20 * MIB, messages=[{"role": "user", "content": "a"}]), 404),
    "a long field": (CHAT, lambda: chat_body("a", **{"x" * 20 * MIB: 1}), 200),
    "brackets": (CHAT, lambda: b"[" * 16 * MIB, 413),
    "fewer brackets": (LEGACY, lambda: b"[" * 100_000, 400),
    "digits": (LEGACY, lambda: b'{"text": "a", "top_k": ' + b"9" * 5 * MIB + b"}", 400),
    "escapes": (LEGACY, lambda: b'{"text": "' + b"\\u4e00" * 3 * MIB + b'"}', 400),
    "percent signs": (CHAT, lambda: uri_body("data:," + "%" * 18 * MIB), (400, 413)),
    "percent escapes": (CHAT, lambda: uri_body("data:," + "%41" * 6 * MIB), (400, 413)),
    "base64 of nothing": (CHAT, lambda: uri_body("data:;base64," + "A" * 26 * MIB), 400),
    "blanks for base64": (LEGACY, lambda: json_bytes(text="a", image=" " * 26 * MIB), 400),
    "a JPEG 2000": (CHAT, lambda: uri_body(unpacked(JPEG_2000)), 400),
    "an AVIF": (CHAT, lambda: uri_body(unpacked(AVIF)), 400),
    "a PNG of 16 bits": (CHAT, lambda: uri_body(data_uri(png_of_zeros(8192, 8192, 16, 0))), 200),
    "prompts": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt=["a"] * 40_000), 422),
    "long prompts": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt=["a " * 20_000] * 60), 400),
    "a long prompt": (COMPLETIONS, lambda: json_bytes(model=MODEL, prompt="好" * 5_000_000), 400),
    "input of nothing": (RESPONSES, lambda: json_bytes(model=MODEL, input=[{}] * 40_000), 422),
    "many input pictures": (
        RESPONSES,
        lambda: json_bytes(
            model=MODEL,
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}] * 2000}],
        ),
        400,
    ),
    "long instructions": (RESPONSES, lambda: json_bytes(model=MODEL, input="a", instructions="a " * 2_000_000), 400),
    "a text to tokenize": (TOKENIZE, lambda: json_bytes(prompt="好" * 5_000_000), 400),
    "a text to count": (TOKENIZE, lambda: json_bytes(prompt=" " * 150_000 + "a"), (200, 400)),
    "biases": (CHAT, lambda: chat_body("a", logit_bias={str(index): 1 for index in range(50_000)}), 422),
    "biases of long texts": (CHAT, lambda: chat_body("a", logit_bias={"x" * 20 * MIB: 1}), 400),
    "a large schema": (CHAT, lambda: schema_body({"enum": ["x" * 10 * MIB]}), 422),
    "a deep schema": (CHAT, lambda: schema_body(nested_schema(400)), 422),
    "a schema of many values": (CHAT, lambda: schema_body({"enum": list(range(100_000))}), 422),
    "a schema of patterns": (
        CHAT,
        lambda: schema_body({"allOf": [{"pattern": f".*a.{{{20 + index}}}b"} for index in range(8)]}),
        (200, 422),
    ),
    "a schema of remainders": (CHAT, lambda: schema_body({"type": "integer", "multipleOf": 9973}), 200),
    "a schema of repeats": (
        CHAT,
        lambda: schema_body({"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**8}}),
        (200, 422),
    ),
    "a PNG with alpha": (
        LEGACY,
        lambda: json_bytes(text="a", image=data_uri(png_of_zeros(8192, 8192, 8, 6)), max_length=60),
        200,
    ),
}


# One of each kind; the others are as large, by other doors or with other values.
TELLING = (
    "messages of nothing",
    "history of words",
    "parts of one word",
    "metadata",
    "many pictures",
    "a long text",
    "a long text of blanks",
    "many long texts",
    "fewer brackets",
    "digits",
    "percent signs",
    "base64 of nothing",
    "a JPEG 2000",
    "a PNG of 16 bits",
    "long prompts",
    "a schema of patterns",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TELLING else [pytest.mark.slow]) for name in HOSTILE]
)
def test_the_neighbour_gets_the_same_answers_about_as_soon_and_the_memory_stays(server, alone, name):
    url, process = server
    path, body, expected = HOSTILE[name]
    body, beside, memory = body(), Neighbour(url), MemoryWatch(process)
    with ThreadPoolExecutor() as threads:
        watching = [threads.submit(beside.ask_until_done), threads.submit(memory.watch)]
        try:
            response = post(url + path, content=body, headers=JSON)
        finally:
            beside.is_done.set()
            memory.is_done.set()
        for each in watching:
            each.result()
    assert set(beside.answers) == set(alone.answers) and len(set(alone.answers)) == 1
    assert max(beside.seconds) < MOST_PATIENCE * statistics.median(alone.seconds)
    assert memory.most - memory.before < MOST_GROWTH
    assert response.status_code in (expected if isinstance(expected, tuple) else (expected,)), response.text[:500]
    assert len(response.content) < 10_000
    assert response.status_code == 200 or response.json()["error"]["message"]


class Long(str):
    """A text of which 32 MiB would take more than a second, if they were gone through like this."""

    def __iter__(self):
        raise AssertionError("character by character")

    def lower(self):
        raise AssertionError("all in lower case")


def test_while_others_wait_no_long_text_is_gone_through_character_by_character():
    assert LegacyRequest.model_construct(text=Long("Hello")).is_english()
    assert not LegacyRequest.model_construct(text=Long("你好")).is_english()
    check_address(Long("HTTP://a"), allow_urls=True)
    with pytest.raises(ApiError):
        check_address(Long("a"), allow_urls=True)


def test_many_large_bodies_at_a_time_do_not_add_up(server):
    url, process = server
    body, memory, neighbour = uri_body("data:;base64," + "A" * 20 * MIB), MemoryWatch(process), Neighbour(url)
    neighbour.ask_once()
    with ThreadPoolExecutor() as threads:
        watching = threads.submit(memory.watch)
        with ThreadPoolExecutor(12) as clients:
            responses = [clients.submit(post, url + CHAT, content=body) for _ in range(12)]
            neighbour.ask_once()
        memory.is_done.set()
        watching.result()
    statuses = {response.result().status_code for response in responses}
    assert statuses <= {400, 429} and 400 in statuses
    assert len(set(neighbour.answers)) == 1
    assert memory.most - memory.before < 2 * MOST_GROWTH


def request_of(stream) -> SimpleNamespace:
    """As much of a request as an intake asks for."""
    return SimpleNamespace(headers={}, stream=stream, state=SimpleNamespace())


@pytest.mark.parametrize(("undisturbed", "stalled", "next_one"), [(0, 408, 200), (60, 200, 429)])
def test_bodies_that_stop_halfway_make_room_for_others(monkeypatch, undisturbed, stalled, next_one):
    monkeypatch.setattr(intake, "UNDISTURBED_SECONDS", undisturbed)
    body = b'{"text": "' + b"a" * (MIB - 12)  # and its end

    async def take_in_all() -> list[int]:
        all_are_there, taking = asyncio.Event(), intake.Intake(MIB)

        async def status_of(waits: bool) -> int:
            async def stream():
                yield body
                if waits:
                    await all_are_there.wait()
                yield b'"}'

            try:
                async with taking.read(request_of(stream), LegacyRequest):
                    return 200
            except ApiError as error:
                return error.status_code

        waiting = [asyncio.create_task(status_of(waits=True)) for _ in range(intake.BODIES_HELD)]
        await asyncio.sleep(0.1)
        statuses = [await status_of(waits=False)]
        all_are_there.set()
        statuses += [await each for each in waiting]
        assert taking.free_bytes == intake.BODIES_HELD * MIB and not taking.arriving
        return statuses

    assert asyncio.run(take_in_all()) == [next_one, stalled, *[200] * (intake.BODIES_HELD - 1)]


def test_of_bodies_that_grow_together_some_arrive():
    chunks = [b'{"text": "' + b"a" * (MIB // 4 - 12), *[b"a" * (MIB // 4)] * 3, b'"}']

    async def take_in_all() -> list[int]:
        taking = intake.Intake(2 * MIB)

        async def status_of_one() -> int:
            async def stream():
                for chunk in chunks:
                    yield chunk
                    await asyncio.sleep(0)  # all others get as far

            try:
                async with taking.read(request_of(stream), LegacyRequest):
                    return 200
            except ApiError as error:
                return error.status_code

        return await asyncio.gather(*(status_of_one() for _ in range(12)))

    statuses = asyncio.run(take_in_all())
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3


def test_a_body_that_never_ends_holds_nobody_up(server):
    url, _ = server
    neighbour, is_done = Neighbour(url), threading.Event()

    def trickle():
        yield b'{"text": "'
        while not is_done.wait(0.05):
            yield b"a" * 1000

    neighbour.ask_once()
    with ThreadPoolExecutor() as threads:
        slow = [threads.submit(post, url, content=trickle()) for _ in range(4)]
        neighbour.ask_once()
        assert not any(each.done() for each in slow)
        is_done.set()
        assert {each.result().status_code for each in slow} == {400}
    assert neighbour.seconds[1] < MOST_PATIENCE * neighbour.seconds[0]
