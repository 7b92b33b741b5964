"""Errors of the routes in the shape of OpenAI's API, whatever the server around them makes of errors.

{"error": {"message": ..., "type": ..., "param": ..., "code": <HTTP status>}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, APIRouter
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from reap_serve.records import MAX_RECORD_DEPTH, depth_of
from reap_serve.shown_text import shown

MAX_MESSAGE_CHARACTERS = 500
# A plan for 61 layers of 384 experts has 2 MB.
MAX_BODY_BYTES = 16 << 20


def error_response(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error.

    Args:
        status: HTTP status.
        message: What is wrong.
        param: The field that is wrong, as a path from the body or the URL.
        headers: Further headers.
    """
    error = {
        "message": shown(message)[:MAX_MESSAGE_CHARACTERS],
        "type": HTTPStatus(status).phrase,
        "param": None if param is None else shown(param)[:MAX_MESSAGE_CHARACTERS],
        "code": int(status),
    }
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class ErrorRoute(APIRoute):
    """A route whose own errors have that shape; errors of the engine go on to the server's handlers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            # Looked at before it is validated: each level multiplies what the validation of free JSON costs.
            announced = request.headers.get("content-length", "")
            if announced.isdecimal() and len(announced) < 20 and int(announced) > MAX_BODY_BYTES:
                return _too_large()
            if len(body := await request.body()) > MAX_BODY_BYTES:
                return _too_large()
            if _too_deep(body):
                return error_response(
                    HTTPStatus.BAD_REQUEST, f"the body is nested deeper than {MAX_RECORD_DEPTH} levels"
                )
            try:
                return await handler(request)
            except RequestValidationError as error:
                return error_response(HTTPStatus.BAD_REQUEST, *_first_problem(error.errors()))
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}) or None)
            except RecursionError:
                return error_response(HTTPStatus.BAD_REQUEST, "the body is nested too deeply")

        return answer


def _too_large() -> JSONResponse:
    return error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")


def _too_deep(body: bytes) -> bool:
    try:
        return bool(body) and depth_of(json.loads(body)) > MAX_RECORD_DEPTH
    except RecursionError:
        return True
    except ValueError:
        # Whoever reads the body says that it is no JSON.
        return False


def _first_problem(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first of a body's problems; nothing of the body is quoted."""
    first = errors[0]
    place = [str(part) for part in first.get("loc", ())]
    if first.get("type") == "json_invalid":
        return "the body is not JSON", None
    name = ".".join(place[1:]) or None
    more = f" ({len(errors)} problems)" if len(errors) > 1 else ""
    return f"{name or 'the body'}: {first.get('msg')}{more}", name


class NoSuchRoute:
    """Answers what no route of a router answers: 405 where the path knows other methods, else 404.

    Args:
        router: The router, whose last route this is.
        prefix: Of its paths.
    """

    def __init__(self, router: APIRouter) -> None:
        self._routes = [route for route in router.routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        plain = {**scope, "path_params": {}}
        allowed = {
            method
            for route in self._routes
            if route.methods and route.matches(plain)[0] == Match.PARTIAL
            for method in route.methods
        }
        if allowed:
            headers = {"Allow": ", ".join(sorted(allowed))}
            response = error_response(HTTPStatus.METHOD_NOT_ALLOWED, f"{scope['method']} is not allowed", None, headers)
        else:
            response = error_response(HTTPStatus.NOT_FOUND, "there is no such route")
        await response(scope, receive, send)
