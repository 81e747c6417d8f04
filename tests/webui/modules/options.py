"""The settings that a client may read and set."""

import json
from collections import namedtuple

from modules.cmd_args import cmd_opts

OptionInfo = namedtuple("OptionInfo", "default label")

LABELS = {
    "samples_save": OptionInfo(True, "Always save all generated images"),
    "samples_format": OptionInfo("png", "File format for images"),
    "grid_save": OptionInfo(True, "Always save all generated image grids"),
    "grid_only_if_multiple": OptionInfo(True, "Do not save grids consisting of one picture"),
    "return_grid": OptionInfo(True, "Show grid in results for web"),
    "enable_pnginfo": OptionInfo(True, "Write infotext to metadata of the generated image"),
    "jpeg_quality": OptionInfo(80, "Quality for saved jpeg and avif images"),
    "n_rows": OptionInfo(-1, "Grid row count; use -1 for autodetect and 0 for it to be same as batch size"),
    "sd_model_checkpoint": OptionInfo("standin.safetensors [0123456789]", "Stable Diffusion checkpoint"),
    "sd_checkpoint_hash": OptionInfo("", "SHA256 hash of the current checkpoint"),
    "sd_vae": OptionInfo("Automatic", "SD VAE"),
    "CLIP_stop_at_last_layers": OptionInfo(1, "Clip skip"),
    "eta_noise_seed_delta": OptionInfo(0, "Eta noise seed delta"),
    "face_restoration_model": OptionInfo("CodeFormer", "Face restoration model"),
    "live_previews_enable": OptionInfo(True, "Show live previews of the created image"),
    "show_progress_every_n_steps": OptionInfo(10, "Live preview display period"),
    "live_previews_image_format": OptionInfo("png", "Live preview file format"),
    "img2img_color_correction": OptionInfo(False, "Apply color correction to img2img results"),
    "outdir_txt2img_samples": OptionInfo("outputs/txt2img-images", "Output directory for txt2img images"),
    "outdir_img2img_samples": OptionInfo("outputs/img2img-images", "Output directory for img2img images"),
    "outdir_txt2img_grids": OptionInfo("outputs/txt2img-grids", "Output directory for txt2img grids"),
    "outdir_img2img_grids": OptionInfo("outputs/img2img-grids", "Output directory for img2img grids"),
    "api_enable_requests": OptionInfo(True, "Let the API load images from http:// and https:// URLs"),
    "api_forbid_local_requests": OptionInfo(True, "Let it load none from local addresses"),
    "hidden_tabs": OptionInfo([], "Hidden UI tabs"),
    "subpath": OptionInfo("", "Subpath"),
}

RESTRICTED = ("api_enable_requests", "api_forbid_local_requests")  # which a client of the API cannot set
PREVIEWS = ("live_previews_enable", "show_progress_every_n_steps", "live_previews_image_format")
if cmd_opts.shape == "sdnext":  # which lacks them
    for name in (*RESTRICTED, *PREVIEWS):
        del LABELS[name]


class Options:
    def __init__(self, filename):
        self.__dict__["filename"] = filename
        self.__dict__["data_labels"] = dict(LABELS)
        self.__dict__["data"] = {key: info.default for key, info in LABELS.items()}
        try:
            with open(filename, encoding="utf8") as file:
                self.data.update(json.load(file))
        except FileNotFoundError:
            pass

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self.data[name] = value

    def set(self, key, value, **_):
        if self.data.get(key) == value or key in RESTRICTED:
            return False
        self.data_labels[key]  # an unknown one is the caller's KeyError
        self.data[key] = value
        return True

    def save(self, filename=None):
        with open(filename or self.filename, "w", encoding="utf8") as file:
            json.dump(self.data, file, indent=4, ensure_ascii=False)
