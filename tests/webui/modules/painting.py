"""Pictures from a prompt and a seed, in place of a model: the same two give the same picture."""

import hashlib

import numpy as np
from PIL import Image

# Sky above, sky at the horizon, light, far hills, near hills.
PALETTES = (
    ("#14213d", "#f4a261", "#ffe8c2", "#8d6a9f", "#1b1b3a"),
    ("#0b3954", "#bfd7ea", "#fff4e0", "#5b8e9d", "#08212f"),
    ("#3d1e6d", "#ff8c61", "#ffd9a0", "#8b4a8b", "#1d0f3a"),
    ("#16423c", "#c4dad2", "#fdf6d8", "#6a9c89", "#0d2420"),
    ("#0d1b2a", "#415a77", "#e0e1dd", "#33506b", "#060d16"),
    ("#7b2d26", "#f0c987", "#fff1c9", "#b56b4a", "#2d1212"),
)


def _rgb(text):
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)


def _mix(a, b, share):
    return a + (b - a) * share


def _ridge(rng, x, height, roughness):
    line = np.zeros_like(x)
    for octave in range(1, 6):
        line += np.sin(x * rng.uniform(2.0, 3.2) * 1.9**octave + rng.uniform(0, 6.3)) * roughness / 1.8**octave
    return height - line


def paint(prompt, seed, width, height, share=1.0):
    """Returns a landscape. Below 1.0, `share` leaves it noisy, as a picture that is not finished."""
    digest = hashlib.sha256((f"{prompt}\n{seed}").encode("utf8", "replace")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    top, horizon, light, far, near = map(_rgb, PALETTES[rng.integers(len(PALETTES))])

    # Painted at a moderate size and enlarged, so that a large picture costs little more.
    scale = min(1.0, 384 / max(width, height))
    w, h = max(8, round(width * scale)), max(8, round(height * scale))
    x = np.linspace(0, w / max(w, h), w, dtype=np.float32)
    y = np.linspace(0, 1, h, dtype=np.float32)[:, None]

    sky = _mix(top, horizon, np.clip(y * 1.5, 0, 1)[..., None] ** 1.4)
    sun_x, sun_y, radius = rng.uniform(0.2, 0.8) * x[-1], rng.uniform(0.22, 0.45), rng.uniform(0.05, 0.11)
    distance = np.hypot(x - sun_x, (y - sun_y) * np.float32(h / max(w, h)))
    glow = 0.55 * np.exp(-((distance / (radius * 3.2)) ** 2)) + np.clip((radius - distance) * max(w, h) / 2, 0, 1)
    picture = _mix(sky, light, np.clip(glow, 0, 1)[..., None])

    hills = int(rng.integers(4, 7))
    base = rng.uniform(0.45, 0.58)
    for number in range(hills):
        depth = number / (hills - 1)
        line = _ridge(rng, x, base + (0.97 - base) * depth**1.15, 0.1 - 0.05 * depth)
        above = int(np.clip(line.min() * h - 1, 0, h))  # rows that the hill leaves alone
        below = y[above:] - line
        cover = np.clip(below * h, 0, 1)[..., None]
        mist = np.clip(0.35 - below * 1.2, 0, 0.35)[..., None] * (1 - depth)
        picture[above:] += (_mix(_mix(far, near, depth), horizon, mist) - picture[above:]) * cover

    picture += rng.standard_normal((h, w, 1), dtype=np.float32) * 2
    if share < 1:
        noise = 128 + 60 * rng.standard_normal((h, w, 3), dtype=np.float32)
        picture += (noise - picture) * (1 - share)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return image if image.size == (width, height) else image.resize((width, height), Image.BICUBIC)
