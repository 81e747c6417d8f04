"""What the extension before this one left in its folder."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any, List

NOW = int(time.time())
INFOTEXT = "a café\nSteps: 20, Sampler: Euler, Seed: 4711, Size: 8x8"


def png(text: str = "", kind: bytes = b"tEXt", size: int = 0) -> bytes:
    """A red dot with a text in it, as the host writes it; `size` more bytes that do not compress."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    content = text.encode("latin-1") if kind == b"tEXt" else b"\0\0\0\0" + text.encode()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + (chunk(kind, b"parameters\0" + content) if text else b"")
        + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
        + (chunk(b"rnDM", os.urandom(size)) if size else b"")
        + chunk(b"IEND", b"")
    )


def entry(job_id: str, age: float = 60, status: str = "Completed", prompt: Any = "a lighthouse", **rest: Any) -> Any:
    """A job as the predecessor keeps it."""
    return {"id": job_id, "prompt": prompt, "ip": "10.0.0.9", "timestamp": NOW - int(age), "status": status, **rest}


def write_array(folder: Path, entries: List[Any]) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(entries, indent=2).encode()
    (folder / "jobs.json").write_bytes(data)
    return data


def write_images(folder: Path, count: int, size: int = 1000) -> List[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}-7.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(png(f"a cat {number}", size=size))
    return paths
