"""The API object that extensions find behind a route."""

from secrets import compare_digest
from typing import List

import uvicorn
from fastapi import Depends, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from modules import middleware, ui
from modules.api import models
from modules.api.endpoints import Endpoints
from modules.api.generation import Generation
from modules.cmd_args import cmd_opts


def credentials_of(flag, colons=True):
    """Reads "u1:p1,u2:p2". Whether a password may have a colon is a matter of who reads."""
    most = 1 if colons else -1
    return dict(pair.strip().split(":", most) for pair in (flag or "").split(",") if pair.strip())


class Api(Endpoints, Generation):
    def __init__(self, app, queue_lock):
        if cmd_opts.api_auth:
            self.credentials = credentials_of(cmd_opts.api_auth, colons=False)
        self.app = app
        self.queue_lock = queue_lock
        if cmd_opts.shape == "a1111":
            middleware.api_middleware(app)
        self.register()
        if not ui.created:
            ui.create_ui()  # in both modes: the scripts' arguments come from their controls

    def register(self):
        def get(path, endpoint, model=None):
            self.add_api_route("/sdapi/v1/" + path, endpoint, methods=["GET"], response_model=model)

        def post(path, endpoint, model=None):
            self.add_api_route("/sdapi/v1/" + path, endpoint, methods=["POST"], response_model=model)

        post("txt2img", self.text2imgapi, models.TextToImageResponse)
        post("img2img", self.img2imgapi, models.ImageToImageResponse)
        post("extra-single-image", self.extras_single_image_api, models.ExtrasSingleImageResponse)
        post("png-info", self.pnginfoapi, models.PNGInfoResponse)
        get("progress", self.progressapi, models.ProgressResponse)
        post("interrogate", self.interrogateapi)
        post("interrupt", self.interruptapi)
        post("skip", self.skip)
        get("options", self.get_config, models.OptionsModel)
        post("options", self.set_config)
        get("cmd-flags", self.get_cmd_flags, models.FlagsModel)
        get("samplers", self.get_samplers, List[models.SamplerItem])
        get("sd-models", self.get_sd_models, List[models.SDModelItem])
        post("refresh-checkpoints", self.refresh_checkpoints)
        get("memory", self.get_memory, models.MemoryResponse)
        get("scripts", self.get_scripts_list, models.ScriptsList)
        if cmd_opts.api_server_stop:
            post("server-kill", self.kill_webui)
            post("server-restart", self.restart_webui)
            post("server-stop", self.stop_webui)

    def add_api_route(self, path, endpoint, **kwargs):
        if cmd_opts.api_auth:
            kwargs["dependencies"] = [Depends(self.auth)]
        return self.app.add_api_route(path, endpoint, **kwargs)

    def auth(self, credentials: HTTPBasicCredentials = Depends(HTTPBasic())):
        expected = self.credentials.get(credentials.username)
        if expected is not None and compare_digest(credentials.password, expected):
            return True
        raise HTTPException(
            status_code=401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
        )

    def launch(self, port, root_path):
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=port,
            timeout_keep_alive=cmd_opts.timeout_keep_alive,
            root_path=root_path,
            ssl_keyfile=cmd_opts.tls_keyfile,
            ssl_certfile=cmd_opts.tls_certfile,
        )
        Server(config).run()


class Server(uvicorn.Server):
    """Says when it serves, as gradio does."""

    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        if self.started:
            print(f"Running on local URL:  http://127.0.0.1:{self.config.port}")
