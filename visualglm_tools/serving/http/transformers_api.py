"""What `transformers chat` asks of a server beyond OpenAI's routes: that its model is loaded, and `generation_config`.

That client sends its settings as the text of a `GenerationConfig`. Those that the chat route knows are taken as if they
were the request's own; the others are fields that it does not know. Not here: the chat route (`openai_api.py`).
"""

import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.http.fields import Fields
from visualglm_tools.serving.http.intake import Intake


FIELD = "generation_config"
# Settings of a GenerationConfig, and what the chat route calls them.
SETTINGS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
}
# What says nothing of an answer: the model knows its own tokens, and the engine its caches.
SILENT = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "_from_model_config")


class LoadRequest(Fields):
    model: str


def create_router(get_engine: Callable[[], Engine], intake: Intake, model_name: str) -> APIRouter:
    """`/load_model`, which tells that the one model is there; while it is being loaded, a 503 as everywhere."""
    router = APIRouter()

    @router.post("/load_model", include_in_schema=False)
    async def load_model(request: Request) -> StreamingResponse:
        get_engine().check_alive()
        async with intake.read(request, LoadRequest) as asked:
            name = asked.model
        state = {"status": "ready", "model": name, "cached": True}
        if name != model_name:
            message = f"There is no model {name[:100]!r}; this server has {model_name!r}."
            state = {"status": "error", "model": name[:100], "message": message}
        return StreamingResponse(iter([f"data: {json.dumps(state)}\n\n"]), media_type="text/event-stream")

    return router


def with_generation_config(values: Any) -> Any:
    """The fields of a chat request, with the settings of its `generation_config`; a field of its own wins.

    Raises:
        ValueError: that is not the text of an object.
    """
    if not isinstance(values, dict) or values.get(FIELD) is None:
        return values
    config = parse_config(values[FIELD])
    settings = {SETTINGS.get(name, f"{FIELD}.{name}"): value for name, value in config.items() if name not in SILENT}
    if settings.pop(f"{FIELD}.do_sample", None) is False:
        settings["temperature"] = 0
    own = {name: value for name, value in values.items() if name != FIELD and value is not None}
    return {**settings, **own}


def parse_config(text: Any) -> dict:
    try:
        config = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FIELD} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{FIELD} must be an object, or the JSON text of one, found {type(config).__name__}")
    return config
