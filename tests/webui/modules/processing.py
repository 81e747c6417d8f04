"""The generation itself: time passes, the state moves, pictures come out. The caller holds the lock."""

import json
import os
import random
import time

from PIL import Image

from modules import images
from modules.cmd_args import cmd_opts
from modules.infotext import create_infotext
from modules.painting import paint
from modules.shared import opts, state

VERSIONS = {"a1111": "v1.10.1", "forge": "f2.0.1v1.10.1-previous-669-gdfdcbab6", "sdnext": "sdnext"}
POLL = 0.02


class Processing:
    """One generation. Its fields are those of the request."""

    scheduler = None
    init_images = None
    mask = None
    denoising_strength = None

    def __init__(self, fields, standin):
        self.__dict__.update(fields)
        self.standin = standin
        self.version = VERSIONS[cmd_opts.shape]
        self.styles = self.styles or []
        self.override_settings = self.override_settings or {}

    def setup_prompts(self):
        many = self.batch_size * self.n_iter
        self.all_prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt] * many
        negative = self.negative_prompt
        self.all_negative_prompts = negative if isinstance(negative, list) else [negative] * len(self.all_prompts)
        self.prompt, self.negative_prompt = self.all_prompts[0], self.all_negative_prompts[0]
        seed, subseed = fixed_seed(self.seed), fixed_seed(self.subseed)
        step = 1 if self.subseed_strength == 0 else 0
        self.all_seeds = [seed + number * step for number in range(len(self.all_prompts))]
        self.all_subseeds = [subseed + number for number in range(len(self.all_prompts))]

    def draw(self, index, share=1.0):
        picture = paint(self.all_prompts[index], self.all_seeds[index], self.width, self.height, share)
        if self.init_images:
            start = self.init_images[index % len(self.init_images)].convert("RGB").resize(picture.size)
            changed = Image.blend(start, picture, min(1, max(0, self.denoising_strength)))
            if self.mask is None:
                return changed
            picture = Image.composite(changed, start, self.mask.convert("L").resize(picture.size))
        return picture


class Processed:
    """The outcome."""

    def __init__(self, p, pictures, infotexts, index_of_first_image):
        self.images = pictures
        self.extra_images = []
        self.standin = p.standin
        self.fields = {
            "prompt": p.all_prompts[0],
            "all_prompts": p.all_prompts,
            "negative_prompt": p.all_negative_prompts[0],
            "all_negative_prompts": p.all_negative_prompts,
            "seed": p.all_seeds[0],
            "all_seeds": p.all_seeds,
            "subseed": p.all_subseeds[0],
            "all_subseeds": p.all_subseeds,
            "subseed_strength": p.subseed_strength,
            "width": p.width,
            "height": p.height,
            "sampler_name": p.sampler_name,
            "cfg_scale": p.cfg_scale,
            "steps": p.steps,
            "batch_size": p.batch_size,
            "restore_faces": bool(p.restore_faces),
            "face_restoration_model": opts.face_restoration_model if p.restore_faces else None,
            "sd_model_name": "standin",
            "sd_model_hash": "0123456789",
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": p.seed_resize_from_w,
            "seed_resize_from_h": p.seed_resize_from_h,
            "denoising_strength": p.denoising_strength,
            "extra_generation_params": {},
            "index_of_first_image": index_of_first_image,
            "infotexts": infotexts,
            "styles": p.styles,
            "job_timestamp": state.job_timestamp,
            "clip_skip": opts.CLIP_stop_at_last_layers,
            "is_using_inpainting_conditioning": False,
            "version": p.version,
        }

    def js(self):
        return json.dumps(self.fields, default=lambda _: None)


def fixed_seed(seed):
    return random.randrange(4294967294) if seed in (None, "", -1) else int(seed)


def process_images(p):
    """Applies the request's settings for as long as the generation takes."""
    before = {key: opts.data[key] for key in p.override_settings if key in opts.data}
    try:
        for key, value in p.override_settings.items():
            opts.set(key, value)
        return _generate(p)
    finally:
        if p.override_settings_restore_afterwards:
            opts.data.update(before)


def _generate(p):
    p.began = time.monotonic()
    if cmd_opts.shape != "sdnext":
        _refuse_late(p)
    p.setup_prompts()
    if state.job_count == -1 or cmd_opts.shape == "sdnext":
        state.job_count = p.n_iter
    _fail_if_due(p)

    pictures, infotexts = [], []
    for iteration in range(p.n_iter):
        state.skipped = False
        if state.interrupted or state.stopping_generation:
            break
        if p.n_iter > 1:
            state.job = f"Batch {iteration + 1} out of {p.n_iter}"
        p.step_multiplier = p.steps // p.steps  # the real program divides by the steps here, too
        first = iteration * p.batch_size
        indexes = range(first, min(first + p.batch_size, len(p.all_prompts)))
        done = _sample(p, first)
        for index in indexes:
            picture, text = p.draw(index, done), create_infotext(p, index)
            if opts.enable_pnginfo:
                picture.info["parameters"] = text
            pictures.append(picture)
            infotexts.append(text)
            if opts.samples_save and not p.do_not_save_samples:
                images.save_image(picture, p.outpath_samples, p.all_seeds[index])
        state.nextjob()
    if p.standin.fail_after and not state.interrupted:
        time.sleep(max(0, p.began + p.standin.fail_after - time.monotonic()))
        _fail_if_due(p)
    infotexts = infotexts or [create_infotext(p, 0)]

    index_of_first_image = 0
    if not p.do_not_save_grid and (len(pictures) > 1 or (pictures and not opts.grid_only_if_multiple)):
        grid = images.image_grid(pictures)
        if opts.enable_pnginfo:
            grid.info["parameters"] = infotexts[0]
        if opts.grid_save:
            images.save_image(grid, p.outpath_grids, "grid")
        if opts.return_grid:
            pictures.insert(0, grid)
            infotexts.insert(0, infotexts[0])
            index_of_first_image = 1

    return _as_wished(p, Processed(p, pictures, infotexts, index_of_first_image))


def _refuse_late(p):
    """What the real program takes for a request and fails of when it generates."""
    assert p.prompt is not None
    if p.steps < 0:
        raise ValueError("negative number of steps")
    if p.seed is not None and abs(p.seed) >= 1 << 64:
        raise RuntimeError("Overflow when unpacking long")
    if p.init_images is not None and not p.init_images:
        raise RuntimeError("bad number of images passed; expecting 1 or more")


def _sample(p, index):
    """Lets the steps pass. Returns how much of the picture is there: less than 1 when interrupted."""
    standin = p.standin
    state.sampling_steps, state.sampling_step = p.steps, 0
    state.current_latent = lambda: p.draw(index, min(1.0, 0.2 + state.sampling_step / p.steps))
    step_time = cmd_opts.step_time if standin.seconds is None else standin.seconds / p.steps / p.n_iter
    start = time.monotonic()
    for step in range(p.steps):
        last = step == p.steps - 1
        if standin.hold and last:
            while not (os.path.exists(standin.hold) or _stopped()):
                _fail_if_due(p)
                time.sleep(POLL)
            start = time.monotonic() - step * step_time
        due = start + (step + 1) * step_time
        while not _stopped():
            _fail_if_due(p, last)
            left = due - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, POLL))
        if _stopped():
            return min(1.0, 0.2 + step / p.steps)
        state.sampling_step = step + 1
    return 1.0


def _stopped():
    return state.interrupted or state.skipped or state.stopping_generation


def _fail_if_due(p, last_step=False):
    standin = p.standin
    if not standin.fail or standin.fail_encoding:
        return
    if standin.fail_after:
        early = time.monotonic() - p.began < standin.fail_after
    else:
        early = standin.hold and not last_step
    if not early:
        raise standin.error()


def _as_wished(p, processed):
    """Makes the outcome as odd as the request wants it."""
    standin = p.standin
    if standin.no_images:
        processed.images = []
    for number in range(standin.extra_images):
        processed.images.append(paint(p.prompt, f"extra {number}", p.width, p.height))
    if standin.image_bytes:
        for image in processed.images:
            image.info["file_size"] = standin.image_bytes
    processed.images += standin.strings
    return processed
