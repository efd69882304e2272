"""Every error that a client sees: OpenAI's shape, and the status that says what to do."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from visualglm_tools.serving.engine.answers import AnswerTimeout, EngineClosed, EngineError, QueueFull
from visualglm_tools.serving.engine.grammar import GrammarTooComplex


LONGEST_TEXT = 1000  # characters of a message, which may quote what the client sent
TYPES = ("bool", "int", "float", "str")  # as pydantic names them where a field may be one of several
LONGEST_VALUE = 60


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class ApiError(HTTPException):
    """An error with OpenAI's fields.

    Args:
        status_code: of HTTP.
        message: what was found, what was expected, what to do.
        param: the field of the request that is wrong.
        code: a word that programs can compare.
        retry_after: seconds.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status_code, message, headers)
        self.param, self.code = param, code

    def as_json(self) -> dict:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        body = {"message": shortened(self.detail), "type": kind, "param": shortened(self.param), "code": self.code}
        # A client's half surrogate pairs, quoted back, have no UTF-8 form.
        return {"error": {name: text and text.encode(errors="replace").decode() for name, text in body.items()}}

    def as_response(self) -> JSONResponse:
        return JSONResponse(self.as_json(), self.status_code, self.headers)


def shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def client_has_left() -> ApiError:
    """Nobody reads it; the status is nginx's."""
    return ApiError(499, "The client has left.")


DESCRIPTIONS = {
    400: "No valid JSON, or a conversation, a picture or a setting that cannot be used",
    401: "The API key is missing or wrong",
    403: "A web page of another origin, or another host name, without a key",
    404: "There is no such model",
    408: "The body did not come in time",
    413: "The request or a picture in it is too large, or has too many values",
    415: "The body is compressed",
    422: "A field is missing, of the wrong type, or asks for what this model cannot do",
    429: "The queue is full, or too much is being taken in; Retry-After says when to come back",
    500: "The model failed",
    503: "The model is being loaded, or the server shuts down",
    504: "The answer was not complete in time",
}


ASKING = (400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)  # what whoever asks a question may get


def responses(*statuses: int) -> dict[int, dict]:
    """What a route documents."""
    return {status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses}


def of_engine(error: EngineError) -> ApiError:
    """What the engine's errors mean to a client."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="unavailable", retry_after=10)
    if isinstance(error, AnswerTimeout):
        return ApiError(504, str(error), code="timeout")
    return ApiError(500, f"The model failed: {error}", code="model_failed")


def of_answer(error: EngineError | ValueError) -> ApiError:
    """What it means to a client that an answer has failed."""
    if isinstance(error, GrammarTooComplex):
        return ApiError(400, str(error), code="schema_too_complex")
    if isinstance(error, ValueError):  # NaN
        return ApiError(500, str(error), code="model_failed")
    return of_engine(error)


def of_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """What pydantic found first, in its words or in ours, with the field and, if it is short, the value."""
    first = error.errors()[0]
    where = ".".join(str(each) for each in field_of(first["loc"]) if each != "body")
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    found = first.get("input")
    if first["type"] == "too_long" and not first["ctx"]["max_length"]:
        message = "this model cannot do that; leave the field out, or empty"
    if first["type"] != "value_error" and isinstance(found, (str, int, float)) and len(repr(found)) <= LONGEST_VALUE:
        message += f", found {found!r}"
    return ApiError(422, f"{where or 'The body'}: {message}", param=where or None, code=first["type"])


def field_of(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where an error is, without which of a field's types it was that did not fit."""
    return place[:-1] if len(place) > 1 and place[-1] in TYPES else place


def of_http(error: HTTPException, request: Request) -> ApiError:
    """Of the framework: of a path or a method that no route has, most of all."""
    is_lost = error.status_code in (404, 405)
    asked = f"{request.method} {shortened(request.url.path)} is none of the routes here; GET /docs shows them."
    found = ApiError(error.status_code, asked if is_lost else str(error.detail))
    found.headers = {**(error.headers or {}), **found.headers}
    return found


def install(app: FastAPI) -> None:
    """Let `app` answer all errors in this shape."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return (error if isinstance(error, ApiError) else of_http(error, request)).as_response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).as_response()

    @app.exception_handler(EngineError)
    async def engine_error(request: Request, error: EngineError) -> JSONResponse:
        return of_engine(error).as_response()

    @app.exception_handler(500)
    async def server_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed; its log says why.").as_response()
