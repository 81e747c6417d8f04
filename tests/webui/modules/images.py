"""Images to and from base64, grids, and saving them in the host's own folders."""

import base64
import datetime
import io
import math
import os

from fastapi import HTTPException
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modules.paths_internal import data_path
from modules.shared import opts

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286


def decode_base64_to_image(encoding):
    if encoding.startswith(("http://", "https://")):
        raise HTTPException(status_code=500, detail="Requests not allowed")
    if encoding.startswith("data:image/"):
        encoding = encoding.split(";")[1].split(",")[1]
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoding)))
        image.load()
        return image
    except Exception as error:
        raise HTTPException(status_code=500, detail="Invalid encoded image") from error


def encode(image, extension):
    """Returns the bytes of a file with the infotext in it, and with `filler` bytes to make it larger."""
    written = io.BytesIO()
    infotext = image.info.get("parameters")
    if extension == "png":
        texts = PngInfo()
        for key, value in image.info.items():
            if isinstance(value, str):
                texts.add_text(key, value)
        filler = image.info.get("filler")
        if filler:
            texts.add(b"fiLl", filler)  # a chunk of its own that every reader skips
        image.save(written, "PNG", pnginfo=texts, compress_level=1)
    elif extension in ("jpg", "jpeg", "webp"):
        exif = Image.Exif()
        if infotext:
            exif[EXIF_IFD] = {USER_COMMENT: b"UNICODE\0" + infotext.encode("utf-16-be")}
        name = "WEBP" if extension == "webp" else "JPEG"
        image.convert("RGB").save(written, name, quality=opts.jpeg_quality, exif=exif)
    else:
        raise HTTPException(status_code=500, detail="Invalid image format")
    return written.getvalue()


def encode_pil_to_base64(image):
    if isinstance(image, str):
        return image
    return base64.b64encode(encode(image, opts.samples_format.lower())).decode("ascii")


def image_grid(images):
    rows = opts.n_rows if opts.n_rows > 0 else round(math.sqrt(len(images)))
    columns = math.ceil(len(images) / min(rows, len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    return grid


def save_image(image, folder, name):
    folder = os.path.join(data_path, folder, datetime.date.today().isoformat())
    os.makedirs(folder, exist_ok=True)
    number = len(os.listdir(folder))
    extension = opts.samples_format.lower()
    with open(os.path.join(folder, f"{number:05d}-{name}.{extension}"), "wb") as file:
        file.write(encode(image, extension))
