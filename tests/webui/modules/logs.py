"""SD.Next takes over every logger when it has started."""

import logging
import sys


class RingBuffer(logging.Handler):
    """Keeps what was said for the page, and leaves the record with a message that is formatted already."""

    def __init__(self):
        super().__init__()
        self.buffer = []

    def emit(self, record):
        record.msg = self.format(record)
        self.buffer = [*self.buffer[-99:], record.msg]


class Console(logging.StreamHandler):
    """Drops what it cannot format."""

    def filter(self, record):
        try:
            record.getMessage()
        except (TypeError, ValueError):
            return False
        return True


def take_over():
    handlers = [RingBuffer(), Console(sys.stderr)]  # in this order after the first error that it has shown
    for name, logger in logging.root.manager.loggerDict.items():
        # The server keeps its own here: tests look for what it says.
        if isinstance(logger, logging.Logger) and not name.startswith("uvicorn"):
            logger.handlers = list(handlers)
