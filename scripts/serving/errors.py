"""Every error that a client sees: OpenAI's shape, and the status that says what to do."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .engine import AnswerTimeout, EngineClosed, EngineError, QueueFull


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
        body = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        # A client's half surrogate pairs, quoted back, have no UTF-8 form.
        return {"error": {name: text and text.encode(errors="replace").decode() for name, text in body.items()}}

    def as_response(self) -> JSONResponse:
        return JSONResponse(self.as_json(), self.status_code, self.headers)


DESCRIPTIONS = {
    400: "No valid JSON, or a conversation, a picture or a setting that cannot be used",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    413: "The request or a picture in it is too large",
    422: "A field is missing, unknown or of the wrong type",
    429: "The queue is full; Retry-After says when to come back",
    500: "The model failed",
    503: "The model is being loaded, or the server shuts down",
    504: "The answer was not complete in time",
}


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


def of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no valid JSON: {first['ctx']['error']}.", code="invalid_json")
    where = ".".join(str(each) for each in first["loc"] if each != "body")
    return ApiError(422, f"{where or 'The body'}: {first['msg']}", param=where or None, code=first["type"])


def of_http(error: HTTPException) -> ApiError:
    """Of the framework, such as 404 for an unknown path."""
    found = ApiError(error.status_code, str(error.detail))
    found.headers = {**(error.headers or {}), **found.headers}
    return found


def install(app: FastAPI) -> None:
    """Let `app` answer all errors in this shape."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return (error if isinstance(error, ApiError) else of_http(error)).as_response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).as_response()

    @app.exception_handler(EngineError)
    async def engine_error(request: Request, error: EngineError) -> JSONResponse:
        return of_engine(error).as_response()

    @app.exception_handler(500)
    async def server_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed; its log says why.").as_response()
