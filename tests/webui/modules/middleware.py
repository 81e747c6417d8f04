"""What the program puts around every route, and how it turns an exception into an answer."""

import asyncio
import re
import time
from collections import deque

from fastapi import HTTPException
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from modules import errors
from modules.cmd_args import cmd_opts


def cors_options():
    origins, pattern = "cors_allow_origins", "cors_allow_origins_regex"
    if cmd_opts.shape == "sdnext":
        origins, pattern = "cors_origins", "cors_regex"
    options = {"allow_methods": ["*"], "allow_headers": ["*"], "allow_credentials": True}
    if getattr(cmd_opts, origins):
        options["allow_origins"] = getattr(cmd_opts, origins).split(",")
    if getattr(cmd_opts, pattern):
        options["allow_origin_regex"] = getattr(cmd_opts, pattern)
    return options


def remove_gradio_cors(app):
    """Gradio lets every origin in; the program does not."""
    app.user_middleware = [entry for entry in app.user_middleware if entry.cls.__name__ != "CORSMiddleware"]


def error_fields(error, **more):
    known = vars(error)
    return {
        "error": type(error).__name__,
        **more,
        "detail": known.get("detail", ""),
        "body": known.get("body", ""),
    }


# AUTOMATIC1111 and Forge


def setup_middleware(app):
    if cmd_opts.shape == "forge":
        # Without effect where the stack is built already, which it always is with the UI.
        app.user_middleware.insert(0, Middleware(GZipMiddleware, minimum_size=1000))
        app.user_middleware.insert(0, Middleware(CORSMiddleware, **cors_options()))
    else:
        app.middleware_stack = None  # otherwise none can be added
        app.add_middleware(GZipMiddleware, minimum_size=1000)
        app.add_middleware(CORSMiddleware, **cors_options())


def api_middleware(app):
    """A1111: the timing, and around it the answer to whatever was raised."""

    async def log_and_time(request, call_next):
        began = time.time()
        response = await call_next(request)
        duration = str(round(time.time() - began, 4))
        response.headers["X-Process-Time"] = duration
        path = request.scope.get("path", "")
        if cmd_opts.api_log and path.startswith("/sdapi"):
            client = (request.client or ("-",))[0]
            print(f"API {response.status_code} {request.method} {path} {client} {duration}")
        return response

    def answer(request, error):
        fields = dict(error_fields(error), errors=str(error))
        if not isinstance(error, HTTPException):
            errors.report(f"API error: {request.method}: {request.url} {fields}", exc_info=True)
        return JSONResponse(status_code=vars(error).get("status_code", 500), content=jsonable_encoder(fields))

    async def exception_handling(request, call_next):
        try:
            return await call_next(request)
        except Exception as error:
            return answer(request, error)

    async def handler(request, error):
        return answer(request, error)

    app.add_exception_handler(Exception, handler)
    app.add_exception_handler(HTTPException, handler)
    app.add_middleware(BaseHTTPMiddleware, dispatch=log_and_time)
    app.add_middleware(BaseHTTPMiddleware, dispatch=exception_handling)


async def forge_exception_handler(request, error):
    fields = dict(error_fields(error), message=str(error))
    return JSONResponse(status_code=int(vars(error).get("status_code", 500)), content=jsonable_encoder(fields))


# SD.Next


class RateLimit:
    """So many points a minute for each client and path; some requests cost more than one."""

    LIMIT = 300
    COST = {
        "/file": 0,
        "/internal/progress": 0,
        "/run/predict": 0,
        "/sdapi/v1/txt2img": 5,
        "/sdapi/v1/img2img": 5,
    }

    def __init__(self):
        self.spent = {}

    def check(self, client, path):
        path = re.match("[^?#&=]+", path).group(0)
        if cmd_opts.subpath and path.startswith(cmd_opts.subpath):
            path = path[len(cmd_opts.subpath) :]
        now, cost = time.monotonic(), self.COST.get(path, 1)
        spent = self.spent.setdefault((client, path), deque())
        while spent and spent[0][0] < now - 60:
            spent.popleft()
        if sum(points for _, points in spent) + cost > self.LIMIT:
            raise HTTPException(status_code=429, detail=f"{client}:{path}: rate limit exceeded")
        spent.append((now, cost))


def setup_sdnext_middleware(app):
    rate_limit = RateLimit()
    app.middleware_stack = None  # otherwise none can be added
    app.add_middleware(GZipMiddleware, minimum_size=2048)
    if cmd_opts.cors_origins or cmd_opts.cors_regex:
        app.add_middleware(CORSMiddleware, **cors_options())

    async def api_preprocess(request, call_next):
        try:
            began = time.time()
            response = await call_next(request)
            response.headers["X-Process-Time"] = str(round(time.time() - began, 4))
            # Both are decided here, when the route has run.
            path = request.scope.get("path", "")
            if cmd_opts.subpath and not path.startswith(cmd_opts.subpath):
                return RedirectResponse(cmd_opts.subpath.rstrip("/") + path, status_code=308)
            if not cmd_opts.no_rate_limit:
                rate_limit.check(request.client.host, path)
            return response
        except asyncio.CancelledError:
            print("WebSocket closed")  # whatever was closed
        except BaseException as error:
            return answer(request, error)

    def answer(request, error):
        status = vars(error).get("status_code", 500)
        fields = dict(error_fields(error, code=status), errors=str(error))
        if status not in (401, 404, 429):
            print(f"ERROR API error: {request.method} {request.url} {fields}")
        if not isinstance(error, (HTTPException, TypeError)):
            errors.display(error, "HTTP API")
        return JSONResponse(status_code=status, content=jsonable_encoder(fields))

    async def handler(request, error):
        return answer(request, error)

    app.add_exception_handler(HTTPException, handler)
    app.add_exception_handler(Exception, handler)
    app.add_middleware(BaseHTTPMiddleware, dispatch=api_preprocess)
