"""`POST /`, the API of the original `api_hf.py`: its fields, its defaults, its answer; but the history has the turn.

`read_text` and `zoom` are this server's own.

Source: `api_hf.py` and `model/infer_util.py` of the original.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field

from visualglm_hf.conversation import has_chinese
from visualglm_tools.serving.engine.engine import Engine
from visualglm_tools.serving.engine.prompts import conversation_messages
from visualglm_tools.serving.engine.sampling import Settings
from visualglm_tools.serving.http.answering import ask, complete
from visualglm_tools.serving.http.errors import ASKING, ApiError, responses
from visualglm_tools.serving.http.fields import Fields, Zoom
from visualglm_tools.serving.http.intake import Intake, check_count


EXAMPLE = {"image": "", "text": "Hello", "history": []}
Turn = Annotated[list[str], Field(min_length=2, max_length=2)]  # a tuple's schema would be none of OpenAPI


class LegacyRequest(Fields):
    """Other fields are ignored, as they always were, and named in a header."""

    image: str | None = Field(
        "", description="base64 of a picture, line breaks allowed, or a data: URI; empty for none"
    )
    text: str = Field(description="the question")
    history: Annotated[list[Turn] | None, BeforeValidator(check_count)] = Field(
        [], description="[question, answer] pairs, oldest first"
    )
    max_length: int = Field(2048, description="of prompt and answer, in tokens")
    min_length: int = Field(50, description="of prompt and answer, in tokens")
    temperature: float = 0.8
    top_p: float = 0.4
    top_k: int = 100
    repetition_penalty: float = 1.2
    read_text: bool = Field(
        False, description="an extension: read the text in the picture and put it before its question"
    )
    zoom: Zoom = Field(
        False, description="an extension: answer from the part of the picture that matters; or how often to look"
    )

    def settings(self) -> Settings:
        return Settings(**self.model_dump(exclude={"image", "text", "history", "read_text", "zoom"}))

    def looking(self) -> dict[str, Any]:
        """How the picture is looked at: keywords of `ask`."""
        return {"read_text": self.read_text, "zoom": self.zoom}

    def messages(self) -> list[dict]:
        """The conversation; its picture stands in front, as in the original."""
        is_bare = self.image and self.image[:5].lower() != "data:"
        picture = f"data:;base64,{self.image}" if is_bare else self.image
        return conversation_messages(self.history or (), self.text, picture)

    def is_english(self) -> bool | None:
        """As the original: whatever has no Chinese; None where nothing is asked but the question about a picture."""
        return not has_chinese(self.text) if self.text.strip() else None


class LegacyResponse(BaseModel):
    result: str
    history: list[Turn]
    status: int
    time: str = Field(examples=["2023-05-17 12:00:00"])


class ReadLegacyResponse(LegacyResponse):
    """The answer to a request with `read_text`."""

    readings: list[str] = Field(description="what was read in the picture; empty for nothing")


def create_router(get_engine: Callable[[], Engine], intake: Intake) -> APIRouter:
    router = APIRouter(tags=["original"])
    body = {"schema": {"$ref": "#/components/schemas/LegacyRequest"}, "example": EXAMPLE}

    @router.post(
        "/",
        response_model=ReadLegacyResponse | LegacyResponse,
        responses=responses(*ASKING),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": body}}},
    )
    async def answer(request: Request) -> LegacyResponse:
        """Ask about a picture, or go on with a conversation; the API of the original VisualGLM-6B."""
        engine, asked_at = get_engine(), time.monotonic()
        # A string may contain line breaks, as base64 on a command line does.
        async with intake.read(request, LegacyRequest, strict=False) as asked:
            try:
                settings = asked.settings()
            except ValueError as error:
                raise ApiError(400, str(error), code="invalid_request") from error
            answers = await ask(engine, asked.messages(), [settings], asked_at, asked.is_english(), **asked.looking())
            asked.image = None  # not while the model answers
        [completion] = await complete(request, answers)
        response = LegacyResponse(
            result=completion.text,
            history=[*(asked.history or ()), [asked.text, completion.text]],
            status=200,
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        readings = list(answers[0].prompt.readings)
        return ReadLegacyResponse(**response.model_dump(), readings=readings) if asked.read_text else response

    return router
