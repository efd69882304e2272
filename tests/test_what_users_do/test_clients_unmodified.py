"""Programs of others, unmodified, against our server; of those that cannot be started here, the requests they make.

The versions of the first are in `tests/clients`. A client that is not installed is skipped: `pip install -r
tests/clients/requirements.txt`, `npm ci --prefix tests/clients`.
"""

import asyncio
import json
import os
import shutil
import subprocess

import httpx
import pytest

from tests.commands import SECONDS
from tests.paths import CIRCLES, ROOT
from tests.serving_helpers import CAPTION, MODEL, answer_of, ask_about, data_uri, error_of, get, post, serve


PICTURE = data_uri(CIRCLES.read_bytes())
QUESTION = "描述这张图片。"
PARTS = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PICTURE}}]
EXACT = {"temperature": 0, "repetition_penalty": 1}  # what the tiny model has learned
CLIENTS = ROOT / "tests" / "clients"


# ------------------------------------------------------------------------------------------------ OpenAI's, JavaScript


def test_openai_in_javascript_lists_asks_streams_and_understands_errors(url):
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules" / "openai").is_dir():
        pytest.skip("needs node, and npm ci --prefix tests/clients")
    command = [node, str(CLIENTS / "chat.cjs"), url, str(CIRCLES)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["models"] == [MODEL]
    assert found["answer"] == found["streamed"] == CAPTION
    assert found["tokens"] > 5
    assert found["refused"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}


# ------------------------------------------------------------------------------------------------ LangChain


@pytest.fixture
def langchain(url):
    """LangChain's chat model at our server."""
    module = pytest.importorskip("langchain_openai", reason="needs pip install -r tests/clients/requirements.txt")
    return module.ChatOpenAI(
        model=MODEL,
        base_url=f"{url}/v1",
        api_key="none",
        temperature=0,
        max_retries=0,
        extra_body={"repetition_penalty": 1},
    )


def test_langchain_asks_about_a_picture_and_goes_on(langchain):
    from langchain_core.messages import HumanMessage, SystemMessage

    messages = [SystemMessage("请用中文回答。"), HumanMessage(content=PARTS)]
    first = langchain.invoke(messages)
    assert "红色" in first.content and first.usage_metadata["output_tokens"] > 5
    assert first.response_metadata["finish_reason"] == "stop"
    second = langchain.invoke([*messages, first, HumanMessage("这张图片的背景里有什么内容？")])
    assert "草地" in second.content


def test_langchain_shows_a_picture_in_its_own_words(langchain):
    """Its standard block for pictures, which it turns into OpenAI's part."""
    from langchain_core.messages import HumanMessage

    picture = {"type": "image", "base64": PICTURE.partition(",")[2], "mime_type": "image/png"}
    assert langchain.invoke([HumanMessage(content=[{"type": "text", "text": QUESTION}, picture])]).content == CAPTION


def test_langchain_streams_batches_and_awaits(langchain):
    from langchain_core.messages import HumanMessage

    messages = [HumanMessage(content=PARTS)]
    chunks = list(langchain.stream(messages, stream_usage=True))
    assert len(chunks) > 3 and "".join(chunk.content for chunk in chunks) == CAPTION
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 5
    described, greeted = langchain.batch([messages, "你好"])
    assert described.content == CAPTION and "你好" in greeted.content
    assert asyncio.run(langchain.ainvoke(messages)).content == CAPTION


# ------------------------------------------------------------------------------------------------ LiteLLM


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # or it asks the internet for prices while it is imported
    return pytest.importorskip("litellm", reason="needs pip install -r tests/clients/requirements.txt")


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_asks_streams_and_understands_errors(litellm, url, provider):
    request = {"model": f"{provider}/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    asked = {"messages": ask_about(PICTURE), "temperature": 0, "extra_body": {"repetition_penalty": 1}}
    whole = litellm.completion(**request, **asked)
    assert whole.choices[0].message.content == CAPTION and whole.usage.completion_tokens > 5
    chunks = list(litellm.completion(**request, **asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == CAPTION
    assert asyncio.run(litellm.acompletion(**request, **asked)).choices[0].message.content == CAPTION
    with pytest.raises(litellm.BadRequestError, match="Shorten"):
        litellm.completion(**request, messages=[{"role": "user", "content": "你好 " * 3000}])


# ------------------------------------------------------------------------------------------------ requests of pages


def events_of(response: httpx.Response) -> list[dict]:
    """The chunks of a stream that ends as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(chunks: list[dict]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


# As Open WebUI writes them (backend/open_webui/routers/openai.py and tasks.py, its Chat.svelte), by hand.
OPEN_WEBUI_CHAT = {
    "stream": True,
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "请用中文回答。"},
        {"role": "user", "content": PARTS},
    ],
    "stream_options": {"include_usage": True},
}
OPEN_WEBUI_TITLE = {
    "model": MODEL,
    "messages": [
        {
            "role": "user",
            "content": "### Task:\nWrite a title of three to five words with an emoji for the chat below.\n"
            '### Output:\nJSON: { "title": "your title" }\n'
            f"### Chat History:\n<chat_history>\nUSER: {QUESTION}\nASSISTANT: {CAPTION}\n</chat_history>",
        }
    ],
    "stream": False,
    "max_completion_tokens": 20,  # 1000 in its settings
}
OPEN_WEBUI_TAGS = {key: value for key, value in OPEN_WEBUI_TITLE.items() if key != "max_completion_tokens"}
# As LobeChat's runtime for OpenAI's API writes them (packages/model-runtime, openaiCompatibleFactory), by hand.
LOBE_CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": ""},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": QUESTION},
                {"type": "image_url", "image_url": {"detail": "auto", "url": PICTURE}},
            ],
        },
    ],
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "temperature": 0,
    "top_p": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "user-1",
}
LOBE_TOPIC = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "你是一名擅长会话的助理，你需要将用户的会话总结为 10 个字以内的标题"},
        {"role": "user", "content": f"user: {QUESTION}\nassistant: {CAPTION}\n\n请总结上述对话为10个字以内的标题"},
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 20,
}


@pytest.mark.parametrize("body", [OPEN_WEBUI_CHAT, LOBE_CHAT], ids=["Open WebUI", "LobeChat"])
def test_a_page_chats_about_a_picture(url, body):
    headers = {
        "Authorization": "Bearer sk-none",
        "Accept": "*/*",
        "HTTP-Referer": "https://page.example",
        "X-Title": "P",
    }
    response = post(f"{url}/v1/chat/completions", json={**body, **EXACT}, headers=headers)
    chunks = events_of(response)
    assert "红色" in text_of(chunks)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 5


def test_a_page_goes_on_and_asks_for_titles(url):
    messages = [*OPEN_WEBUI_CHAT["messages"], {"role": "assistant", "content": CAPTION}]
    messages.append({"role": "user", "content": "这张图片的背景里有什么内容？"})
    body = {**OPEN_WEBUI_CHAT, **EXACT, "messages": messages}
    assert "草地" in text_of(events_of(post(f"{url}/v1/chat/completions", json=body)))
    for title in (OPEN_WEBUI_TITLE, {**OPEN_WEBUI_TAGS, "max_tokens": 20}):
        assert answer_of(post(f"{url}/v1/chat/completions", json=title))
    assert text_of(events_of(post(f"{url}/v1/chat/completions", json=LOBE_TOPIC)))


def test_a_page_that_is_given_a_key_lists_the_models_again_and_again(engine):
    with serve(engine, api_key="sk-1") as url:
        for _ in range(3):
            found = get(f"{url}/v1/models", headers={"Authorization": "Bearer sk-1"}).json()
            assert [model["id"] for model in found["data"]] == [MODEL]
        assert error_of(get(f"{url}/v1/models"), 401)


def test_a_field_that_nobody_here_knows_does_not_end_a_chat_unnoticed(url):
    """Either it is refused by its name, or the answer says that it was ignored."""
    response = post(f"{url}/v1/chat/completions", json={**LOBE_CHAT, "apiMode": "chatCompletion", "stream": False})
    told = response.text if response.status_code == 422 else str(response.headers)
    assert response.status_code in (200, 422) and "apiMode" in told


def test_a_page_in_a_browser_calls_only_if_it_is_named(engine):
    """LobeChat's and Open WebUI's direct connections ask from the browser, after a preflight."""
    page = {"Origin": "http://localhost:3210"}
    preflight = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serve(engine, cors_origins=[page["Origin"]], api_key="sk-1") as url:
        answer = httpx.options(f"{url}/v1/chat/completions", headers=preflight, timeout=SECONDS)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
        headers = {**page, "Authorization": "Bearer sk-1"}
        chunks = events_of(post(f"{url}/v1/chat/completions", json={**LOBE_CHAT, **EXACT}, headers=headers))
        assert text_of(chunks) == CAPTION


def test_the_pinned_clients_are_those_of_the_file():
    """What is installed here is what the versions in the repository say, so that a pass is a pass of these."""
    from importlib.metadata import PackageNotFoundError, version

    lines = (CLIENTS / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins.keys() == {"langchain-openai", "litellm"}
    for name, pinned in pins.items():
        try:
            assert version(name) == pinned
        except PackageNotFoundError:
            continue
    package = CLIENTS / "node_modules" / "openai" / "package.json"
    if os.path.exists(package):
        wanted = json.loads((CLIENTS / "package.json").read_text(encoding="utf-8"))["dependencies"]["openai"]
        assert json.loads(package.read_text(encoding="utf-8"))["version"] == wanted
