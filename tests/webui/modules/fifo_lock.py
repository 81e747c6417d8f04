"""A lock that serves its waiters in the order in which they came."""

import threading
from collections import deque


class FIFOLock:
    def __init__(self):
        self._guard = threading.Lock()
        self._held = False
        self._waiting = deque()

    def acquire(self, blocking=True):
        with self._guard:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        return True

    def release(self):
        with self._guard:
            if not self._held:
                raise RuntimeError("release unlocked lock")
            if self._waiting:
                self._waiting.popleft().set()  # still held, by the one who was woken
            else:
                self._held = False

    __enter__ = acquire

    def __exit__(self, *exc):
        self.release()
