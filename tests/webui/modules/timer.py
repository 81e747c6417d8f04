"""How long the parts of a start take."""

import time


class Timer:
    def __init__(self):
        self.reset()

    def reset(self):
        self.start = self.last = time.time()
        self.records = {}

    def record(self, category):
        now = time.time()
        self.records[category] = self.records.get(category, 0) + now - self.last
        self.last = now

    def summary(self):
        parts = ", ".join(f"{name}: {took:.1f}s" for name, took in self.records.items() if took >= 0.1)
        total = f"{time.time() - self.start:.1f}s"
        return f"{total} ({parts})" if parts else total


startup_timer = Timer()
