"""What a request can ask of this stand-in, by the always-on script "Stand-in":

    "alwayson_scripts": {"Stand-in": {"args": [{"hold": "/tmp/go", "fail": "OutOfMemoryError"}]}}

| key | effect |
| --- | --- |
| `seconds` | the generation takes so long, instead of steps times the step time |
| `hold` | before its last step the generation waits until this file exists |
| `fail` | the generation raises an exception of this name: at once, or after the hold |
| `fail_after` | seconds after the start at which it raises |
| `message` | the exception's text |
| `fail_encoding` | the exception comes when the images are encoded, after the lock was released |
| `image_bytes` | each PNG is filled up to so many bytes, with random ones that no gzip makes smaller |
| `extra_images` | so many images more, as a script would append |
| `strings` | texts appended to `images`, as they are |
| `no_images` | `images` is empty |
"""

import builtins
import json


class StandIn:
    def __init__(self, wishes=None):
        if isinstance(wishes, str):
            wishes = json.loads(wishes)
        wishes = wishes or {}
        self.seconds = wishes.get("seconds")
        self.hold = wishes.get("hold")
        self.fail = wishes.get("fail")
        self.fail_after = wishes.get("fail_after")
        self.message = wishes.get("message", "")
        self.fail_encoding = wishes.get("fail_encoding", False)
        self.image_bytes = wishes.get("image_bytes", 0)
        self.extra_images = wishes.get("extra_images", 0)
        self.strings = wishes.get("strings", [])
        self.no_images = wishes.get("no_images", False)

    def error(self):
        name = self.fail or "RuntimeError"
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = type(name, (RuntimeError,), {})
        return kind(self.message) if self.message else kind()
