"""Images to and from base64, grids, and saving them in the host's own folders."""

import base64
import datetime
import io
import math
import os
import struct
import zlib

import numpy as np
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
    """Returns the bytes of a file with the infotext in it, as large as the image's `file_size` wants it."""
    written = io.BytesIO()
    infotext = image.info.get("parameters")
    if extension == "png":
        texts = PngInfo()
        for key, value in image.info.items():
            if isinstance(value, str):
                texts.add_text(key, value)
        image.save(written, "PNG", pnginfo=texts, compress_level=1)
        return _fill(written.getvalue(), image.info.get("file_size", 0))
    if extension in ("jpg", "jpeg", "webp"):
        exif = Image.Exif()
        if infotext:
            exif[EXIF_IFD] = {USER_COMMENT: b"UNICODE\0" + infotext.encode("utf-16-be")}
        name = "WEBP" if extension == "webp" else "JPEG"
        image.convert("RGB").save(written, name, quality=opts.jpeg_quality, exif=exif)
    else:
        raise HTTPException(status_code=500, detail="Invalid image format")
    return written.getvalue()


def _fill(png, size):
    """Puts a chunk that every reader skips before the last one, IEND. A chunk has 12 bytes besides its content."""
    missing = size - len(png) - 12
    if missing <= 0:
        return png
    content = b"fiLl" + np.random.default_rng(size).bytes(missing)
    return png[:-12] + struct.pack(">I", missing) + content + struct.pack(">I", zlib.crc32(content)) + png[-12:]


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
