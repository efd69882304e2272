"""`/tokenize`, as vLLM has it, and `/version`: what clients ask before they ask the model."""

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from visualglm_tools.serving.http.answering import prepare, prepare_text
from visualglm_tools.serving.http.errors import ASKING, responses
from visualglm_tools.serving.http.fields import Fields
from visualglm_tools.serving.http.intake import check_count
from visualglm_tools.serving.http.openai_api import Message
from visualglm_tools.serving.http.service import Service, body_of


PACKAGE = "visualglm-hf"


class TokenizeRequest(Fields):
    """A text, or a conversation as `/v1/chat/completions` has it."""

    model: str | None = None
    prompt: str | None = Field(None, description="a text, as `/v1/completions` takes it")
    messages: Annotated[list[Message], BeforeValidator(check_count)] = []
    add_special_tokens: bool = Field(True, description="of a prompt: the two behind which the model answers")
    return_token_strs: bool = Field(False, description="tell each token in words too")

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("send a prompt, or messages, and not both")
        return self


class TokenizeResponse(BaseModel):
    count: int = Field(description="those of pictures included, 32 each for the original's weights")
    max_model_len: int = Field(description="tokens of prompt and answer together")
    tokens: list[int]
    token_strs: list[str] | None = None


class VersionResponse(BaseModel):
    version: str


def create_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.post(
        "/tokenize",
        response_model=TokenizeResponse,
        responses=responses(*ASKING, 404),
        openapi_extra=body_of("TokenizeRequest"),
    )
    async def tokenize(request: Request) -> TokenizeResponse:
        """The tokens of a text or of a conversation, and how many there are."""
        engine, asked_at = service.get_engine(), time.monotonic()
        async with service.intake.read(request, TokenizeRequest) as asked:
            if asked.model is not None:
                service.check_model(asked.model)
            if asked.prompt is not None:
                prompt = await prepare_text(engine, asked.prompt, asked_at, asked.add_special_tokens)
            else:
                service.check_addresses(url for message in asked.messages for url in message.picture_urls())
                messages = [message.for_engine() for message in asked.messages]
                prompt = await prepare(engine, messages, asked_at, service.fetch_for(engine))
        tokens = list(prompt.token_ids)
        names = [engine.vocabulary.name_of(token) for token in tokens] if asked.return_token_strs else None
        return TokenizeResponse(count=len(tokens), max_model_len=engine.context_length, tokens=tokens, token_strs=names)

    @router.get("/version", responses=responses(401, 403))
    async def tell_version() -> VersionResponse:
        """The release of this server."""
        return VersionResponse(version=installed_version())

    return router


def installed_version() -> str:
    """That of the package; "unknown" where it lies in a folder without being installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"
