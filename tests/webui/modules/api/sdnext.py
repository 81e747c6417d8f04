"""SD.Next's API object, which extensions find as `modules.shared.api`. The generation routes belong to another."""

from secrets import compare_digest

from fastapi import Depends, HTTPException, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from modules import shared
from modules.api import models
from modules.api.api import credentials_of
from modules.api.endpoints import Endpoints
from modules.api.generation import SDNextGeneration
from modules.cmd_args import cmd_opts


class Api(Endpoints):
    def __init__(self, app, queue_lock):
        self.credentials = credentials_of((cmd_opts.auth or "").replace('"', ""))
        self.app = app
        self.queue_lock = queue_lock
        self.generate = SDNextGeneration(queue_lock)
        self.text2imgapi = self.generate.post_text2img
        self.img2imgapi = self.generate.post_img2img

    def register(self):
        def get(path, endpoint, model=None):
            self.add_api_route("/sdapi/v1/" + path, endpoint, methods=["GET"], response_model=model)

        def post(path, endpoint, model=None, **kwargs):
            self.add_api_route("/sdapi/v1/" + path, endpoint, methods=["POST"], response_model=model, **kwargs)

        get("progress", self.progressapi, models.ProgressResponse)
        post("interrupt", self.post_interrupt, status_code=204)
        post("skip", self.post_skip, status_code=204)
        get("memory", self.get_memory, models.MemoryResponse)
        get("cmd-flags", self.get_cmd_flags, models.FlagsModel)
        post("txt2img", self.generate.post_text2img, models.TextToImageResponse)
        post("img2img", self.generate.post_img2img, models.ImageToImageResponse)
        post("extra-single-image", self.extras_single_image_api, models.ExtrasSingleImageResponse)
        post("interrogate", self.interrogateapi)
        get("scripts", self.get_scripts_list, models.ScriptsList)
        get("samplers", self.get_samplers)
        get("sd-models", self.get_sd_models)
        post("png-info", self.pnginfoapi, models.PNGInfoResponse)
        post("refresh-checkpoints", self.refresh_checkpoints)
        get("options", self.get_config)
        post("options", self.set_options)

    def add_api_route(self, path, fn, auth=True, **kwargs):
        if auth and self.credentials:
            kwargs["dependencies"] = list(kwargs.get("dependencies", [])) + [Depends(self.auth)]
        if shared.opts.subpath:
            self.app.add_api_route(shared.opts.subpath + path, endpoint=fn, **kwargs)
        self.app.add_api_route(path, endpoint=fn, **kwargs)

    def auth(self, credentials: HTTPBasicCredentials = Depends(HTTPBasic())):
        expected = self.credentials.get(credentials.username)
        if expected is not None and compare_digest(credentials.password, expected):
            return True
        raise HTTPException(status_code=401, detail="Unauthorized", headers={"WWW-Authenticate": "Basic"})

    def post_interrupt(self):
        shared.state.interrupt()
        return Response(status_code=204)

    def post_skip(self):
        shared.state.skip()
        return Response(status_code=204)

    def set_options(self, req: dict):
        updated = [{key: shared.opts.set(key, value)} for key, value in req.items()]
        shared.opts.save()
        return {"updated": updated}
