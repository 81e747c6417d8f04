"""Requests and answers of the API, for pydantic 1 and 2."""

from typing import Any, Dict, List, Optional

from pydantic import BaseModel, Field, create_model

from modules.cmd_args import cmd_opts, parser
from modules.options import LABELS

_COMMON = [
    ("prompt", str, ""),
    ("negative_prompt", str, ""),
    ("styles", List[str], None),
    ("seed", int, -1),
    ("subseed", int, -1),
    ("subseed_strength", float, 0),
    ("seed_resize_from_h", int, -1),
    ("seed_resize_from_w", int, -1),
    ("sampler_name", str, None),
    ("scheduler", str, None),
    ("batch_size", int, 1),
    ("n_iter", int, 1),
    ("steps", int, 50),
    ("cfg_scale", float, 7.0),
    ("width", int, 512),
    ("height", int, 512),
    ("restore_faces", bool, None),
    ("tiling", bool, None),
    ("do_not_save_samples", bool, False),
    ("do_not_save_grid", bool, False),
    ("eta", float, None),
    ("denoising_strength", float, 0.75),
    ("s_min_uncond", float, None),
    ("s_churn", float, None),
    ("s_tmax", float, None),
    ("s_tmin", float, None),
    ("s_noise", float, None),
    ("override_settings", Dict[str, Any], None),
    ("override_settings_restore_afterwards", bool, True),
    ("refiner_checkpoint", str, None),
    ("refiner_switch_at", float, None),
    ("disable_extra_networks", bool, False),
    ("firstpass_image", str, None),
    ("comments", Dict[str, Any], None),
]
_TXT2IMG = [
    ("denoising_strength", float, None),
    ("enable_hr", bool, False),
    ("firstphase_width", int, 0),
    ("firstphase_height", int, 0),
    ("hr_scale", float, 2.0),
    ("hr_upscaler", str, None),
    ("hr_second_pass_steps", int, 0),
    ("hr_resize_x", int, 0),
    ("hr_resize_y", int, 0),
    ("hr_checkpoint_name", str, None),
    ("hr_sampler_name", str, None),
    ("hr_scheduler", str, None),
    ("hr_prompt", str, ""),
    ("hr_negative_prompt", str, ""),
]
_IMG2IMG = [
    ("init_images", List[Any], None),
    ("resize_mode", int, 0),
    ("image_cfg_scale", float, None),
    ("mask", str, None),
    ("mask_blur_x", int, 4),
    ("mask_blur_y", int, 4),
    ("mask_blur", int, None),
    ("mask_round", bool, True),
    ("inpainting_fill", int, 0),
    ("inpaint_full_res", bool, True),
    ("inpaint_full_res_padding", int, 0),
    ("inpainting_mask_invert", int, 0),
    ("initial_noise_multiplier", float, None),
    ("latent_mask", str, None),
    ("include_init_images", bool, False),
]
_API = [
    ("force_task_id", str, None),
    ("sampler_index", str, "Euler"),
    ("script_name", str, None),
    ("script_args", List[Any], []),
    ("send_images", bool, True),
    ("save_images", bool, False),
    ("alwayson_scripts", Dict[str, Any], {}),
    ("infotext", str, None),
]


def _request(name, *groups):
    fields = {key: (Optional[kind], default) for group in groups for key, kind, default in group}
    if cmd_opts.shape == "sdnext":
        del fields["force_task_id"]
        if "init_images" in fields:
            fields["init_images"] = (List[Any], None)  # left out, but not null
    return create_model(name, **fields)


Txt2ImgRequest = _request("StableDiffusionProcessingTxt2Img", _COMMON, _TXT2IMG, _API)
Img2ImgRequest = _request("StableDiffusionProcessingImg2Img", _COMMON, _IMG2IMG, _API)


class TextToImageResponse(BaseModel):
    images: Optional[List[str]] = Field(default=None, title="Image", description="The generated images, in base64")
    parameters: Dict[str, Any]
    info: str


class ImageToImageResponse(TextToImageResponse):
    pass


class ExtrasSingleImageRequest(BaseModel):
    image: str = ""
    resize_mode: int = 0
    upscaling_resize: float = 2
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaler_1: str = "None"
    upscaler_2: str = "None"


class ExtrasSingleImageResponse(BaseModel):
    html_info: str
    image: Optional[str] = None


class PNGInfoRequest(BaseModel):
    image: str


class PNGInfoResponse(BaseModel):
    info: str
    items: Dict[str, Any]
    parameters: Dict[str, Any]


class InterrogateRequest(BaseModel):
    image: str = ""
    model: str = "clip"


class InterrogateResponse(BaseModel):
    caption: Optional[str] = None


class ProgressRequest(BaseModel):
    skip_current_image: bool = Field(default=False, title="Skip current image")


class ProgressResponse(BaseModel):
    progress: float = Field(title="Progress", description="From 0 to 1")
    eta_relative: float = Field(title="ETA in secs")
    state: Dict[str, Any] = Field(title="State")
    current_image: Optional[str] = Field(default=None, title="Current image", description="In base64")
    textinfo: Optional[str] = Field(default=None, title="Info text")


class MemoryResponse(BaseModel):
    ram: Dict[str, Any]
    cuda: Dict[str, Any]


class SamplerItem(BaseModel):
    name: str
    aliases: List[str]
    options: Dict[str, str]


class SDModelItem(BaseModel):
    title: str
    model_name: str = Field(title="Model Name")
    hash: Optional[str] = None
    sha256: Optional[str] = None
    filename: str
    config: Optional[str] = None

    class Config:
        protected_namespaces = ()


class ScriptsList(BaseModel):
    txt2img: List[str]
    img2img: List[str]


def _known(name, defaults):
    return create_model(
        name, **{key: (Optional[Any], Field(default=value, description=text)) for key, value, text in defaults}
    )


OptionsModel = _known("Options", [(key, info.default, info.label) for key, info in LABELS.items()])
FlagsModel = _known("Flags", [(flag.dest, flag.default, flag.help) for flag in parser._actions if flag.dest != "help"])
