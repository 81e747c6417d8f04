"""The other routes: those that answer at once, and those that take the lock for other work."""

import asyncio
import os
import sys
import threading
import time

from fastapi import Depends, HTTPException, Response

from modules import images, progress, scripts, sd_samplers, shared
from modules.api import models
from modules.cmd_args import cmd_opts
from modules.infotext import parse_generation_parameters

WORK = 10  # sampling steps that other work on an image takes


class Endpoints:
    """Mixed into the Api object, which has the lock."""

    def extras_single_image_api(self, req: models.ExtrasSingleImageRequest):
        image = images.decode_base64_to_image(req.image)
        with self.queue_lock:
            shared.state.begin("extras")
            time.sleep(cmd_opts.step_time * WORK)
            size = (req.upscaling_resize_w, req.upscaling_resize_h)
            if req.resize_mode == 0:
                size = (round(image.width * req.upscaling_resize), round(image.height * req.upscaling_resize))
            result = image.resize(size)
            shared.state.end()
        return models.ExtrasSingleImageResponse(image=images.encode_pil_to_base64(result), html_info="")

    def interrogateapi(self, interrogatereq: models.InterrogateRequest):
        image = images.decode_base64_to_image(interrogatereq.image)
        with self.queue_lock:
            if interrogatereq.model not in ("clip", "deepdanbooru"):
                raise HTTPException(status_code=404, detail="Model not found")
            shared.state.begin("interrogate")
            time.sleep(cmd_opts.step_time * WORK)
            shared.state.end()
        return models.InterrogateResponse(caption=f"a picture of {image.width}x{image.height} pixels")

    def refresh_checkpoints(self):
        with self.queue_lock:
            pass

    def pnginfoapi(self, req: models.PNGInfoRequest):
        image = images.decode_base64_to_image(req.image.strip())
        items = {key: value for key, value in image.info.items() if isinstance(value, str)}
        info = items.pop("parameters", "")
        return models.PNGInfoResponse(info=info, items=items, parameters=parse_generation_parameters(info))

    def progressapi(self, req: models.ProgressRequest = Depends()):
        state = shared.state
        answer = models.ProgressResponse(progress=0, eta_relative=0, state=state.dict(), textinfo=state.textinfo)
        jobs, steps = state.job_count, state.sampling_steps
        if jobs == 0:
            return answer
        share = 0.01
        if jobs > 0:
            share += state.job_no / jobs
        if steps > 0:
            share += state.sampling_step / steps / jobs
        elapsed = time.time() - state.time_start
        answer.progress, answer.eta_relative = min(share, 1), elapsed / share - elapsed
        state.set_current_image()
        preview = state.current_image
        if preview is not None and not req.skip_current_image:
            answer.current_image = images.encode_pil_to_base64(preview)
        return answer

    def interruptapi(self):
        shared.state.interrupt()
        return {}

    def skip(self):
        shared.state.skip()

    def get_config(self):
        return shared.opts.data

    def set_config(self, req: dict):
        checkpoint = req.get("sd_model_checkpoint")
        known = (None, "standin", "standin.safetensors", shared.opts.sd_model_checkpoint)
        if checkpoint not in known:
            raise RuntimeError(f"model {checkpoint!r} not found")
        for key, value in req.items():
            shared.opts.set(key, value)
        shared.opts.save()

    def get_cmd_flags(self):
        return vars(cmd_opts)

    def get_samplers(self):
        return [sampler._asdict() for sampler in sd_samplers.all_samplers]

    def get_sd_models(self):
        path = os.path.join(cmd_opts.data_dir, "models", "Stable-diffusion", "standin.safetensors")
        title = "standin.safetensors [0123456789]"
        return [{"title": title, "model_name": "standin", "hash": "0123456789", "sha256": None, "filename": path}]

    def get_scripts_list(self):
        names = [scripts.SELECTABLE, scripts.ALWAYS_ON]
        return models.ScriptsList(txt2img=names, img2img=names)

    def get_memory(self):
        used = resident_bytes() or 0
        return models.MemoryResponse(ram={"free": 0, "used": used, "total": used}, cuda={"error": "unavailable"})

    def kill_webui(self):
        os._exit(0)

    def restart_webui(self):
        if os.environ.get("SD_WEBUI_RESTART"):
            os._exit(0)
        return Response(status_code=501)

    def stop_webui(self):
        shared.state.server_command = "stop"
        return Response("Stopping.")


def resident_bytes():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def empty():
    """As little as a route can do, for measurements."""
    return {}


async def threads():
    """What the process holds, to find leaks."""
    import anyio.to_thread

    limiter = anyio.to_thread.current_default_thread_limiter()
    return {
        "total_tokens": limiter.total_tokens,
        "borrowed_tokens": limiter.borrowed_tokens,
        "threads": threading.active_count(),
        "rss_bytes": resident_bytes(),
        "open_files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None,
        "tasks": len(asyncio.all_tasks()),
        "pending_tasks": len(progress.pending_tasks),
    }


def modules():
    """The names of all modules that are loaded."""
    return [name for name, module in sys.modules.items() if module is not None]


def reload_ui():
    """What the footer's button does."""
    shared.state.request_restart()
    return {}


def add_standin_routes(app):
    app.add_api_route("/standin/empty", empty, methods=["GET"])
    app.add_api_route("/standin/threads", threads, methods=["GET"])
    app.add_api_route("/standin/modules", modules, methods=["GET"])
    app.add_api_route("/standin/reload", reload_ui, methods=["POST"])
