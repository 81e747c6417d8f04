"""The two generation routes, in the order in which each of the family does things."""

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from modules import images, progress, scripts, sd_samplers
from modules.api import models
from modules.processing import Processing, process_images
from modules.shared import opts, state
from modules.standin import StandIn

OUTSIDE = "script_name script_args alwayson_scripts infotext send_images save_images include_init_images".split()


def arguments(request, sampler, scheduler, mask=None):
    """Returns the fields of the generation."""
    fields = {key: value for key, value in vars(request).items() if key not in OUTSIDE}
    fields.update(
        sampler_name=sampler,
        scheduler=request.scheduler or (scheduler if scheduler != "Automatic" else None),
        do_not_save_samples=not request.save_images,
        do_not_save_grid=not request.save_images,
        mask=mask,
    )
    return fields


def prepare(p, kind):
    p.outpath_samples = opts.data[f"outdir_{kind}_samples"]
    p.outpath_grids = opts.data[f"outdir_{kind}_grids"]


def always_on(request, missing):
    """Returns what the request wants of the Stand-in; refuses a script that there is not."""
    wishes = None
    for name, script in (request.alwayson_scripts or {}).items():
        if name.lower() != scripts.ALWAYS_ON:
            raise HTTPException(status_code=422, detail=missing(name))
        wishes = (script.get("args") or [None])[0]
    return StandIn(wishes)


def encode(processed, send_images):
    """Returns the images in base64. The lock is free again."""
    if processed.standin.fail_encoding:
        raise processed.standin.error()
    return [images.encode_pil_to_base64(image) for image in processed.images] if send_images else []


def repeat(p, request):
    p.n_iter *= int((request.script_args or [2])[0])


class Generation:
    """The routes of AUTOMATIC1111 and Forge. Mixed into their Api object, which has the lock."""

    def text2imgapi(self, txt2imgreq: models.Txt2ImgRequest):
        return self._generate("txt2img", txt2imgreq, models.TextToImageResponse)

    def img2imgapi(self, img2imgreq: models.Img2ImgRequest):
        if img2imgreq.init_images is None:
            raise HTTPException(status_code=404, detail="Init image not found")
        mask = images.decode_base64_to_image(img2imgreq.mask) if img2imgreq.mask else None
        answer = self._generate("img2img", img2imgreq, models.ImageToImageResponse, mask)
        if not img2imgreq.include_init_images:
            answer.parameters["init_images"] = answer.parameters["mask"] = None
        return answer

    def _generate(self, kind, request, response, mask=None):
        task = request.force_task_id or progress.create_task_id(kind)
        if request.script_name and request.script_name.lower() != scripts.SELECTABLE:
            raise HTTPException(status_code=422, detail=f"Script '{request.script_name}' not found")
        fields = arguments(
            request,
            *sd_samplers.get_sampler_and_scheduler(request.sampler_name or request.sampler_index, request.scheduler),
            mask=mask,
        )
        standin = always_on(request, "Script '{}' not found".format)
        progress.add_task_to_queue(task)

        with self.queue_lock:
            p = Processing(fields, standin)
            if kind == "img2img":
                p.init_images = [images.decode_base64_to_image(image) for image in request.init_images]
            prepare(p, kind)
            try:
                state.begin(job="scripts_" + kind)
                progress.start_task(task)
                if request.script_name:
                    repeat(p, request)
                processed = process_images(p)
                progress.finish_task(task)
            finally:
                state.end()

        encoded = encode(processed, request.send_images)
        return response(images=encoded, parameters=dict(vars(request)), info=processed.js())


class SDNextGeneration:
    """SD.Next's routes, on an object that has nothing but the lock."""

    def __init__(self, queue_lock):
        self.queue_lock = queue_lock

    def post_text2img(self, txt2imgreq: models.Txt2ImgRequest):
        return self._generate("txt2img", txt2imgreq, models.TextToImageResponse)

    def post_img2img(self, img2imgreq: models.Img2ImgRequest):
        if img2imgreq.init_images is None:
            return JSONResponse(status_code=400, content={"error": "Init image is none"})
        mask = images.decode_base64_to_image(img2imgreq.mask) if img2imgreq.mask else None
        answer = self._generate("img2img", img2imgreq, models.ImageToImageResponse, mask)
        if not img2imgreq.include_init_images:
            answer.parameters["init_images"] = answer.parameters["mask"] = None
        return answer

    def _generate(self, kind, request, response, mask=None):
        sampler = sd_samplers.find(request.sampler_name or request.sampler_index)
        if sampler is None:
            raise HTTPException(status_code=404, detail="Sampler not found")
        fields = arguments(request, sampler, request.scheduler, mask)

        with self.queue_lock:
            p = Processing(fields, None)
            if kind == "img2img":
                p.init_images = [images.decode_base64_to_image(image) for image in request.init_images]
            prepare(p, kind)
            job = state.begin("API-TXT" if kind == "txt2img" else "API-IMG", api=True)
            p.standin = always_on(request, "Always on script not found: {}".format)
            if (request.script_name or "").lower() == scripts.SELECTABLE:  # another one is ignored
                repeat(p, request)
            processed = process_images(p)
            state.end(job, api=False)

        encoded = encode(processed, request.send_images)
        return response(images=encoded, parameters=dict(vars(request)), info=processed.js())
