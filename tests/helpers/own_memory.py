"""Memory of a piece of code, measured in a process of its own: its anonymous pages, so no mapped file counts."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path


class Peak:
    """In a `with`: `bytes` is how far the process's own memory rose above where it was at the start (Linux)."""

    def __enter__(self):
        self._start, self._highest, self._running = own(), 0, True
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error):
        self._running = False
        self._watcher.join()
        self.bytes = self._highest - self._start

    def _watch(self):
        while self._running:
            self._highest = max(self._highest, own())
            time.sleep(0.001)


def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def printed(code, *arguments):
    """What a new process prints that runs `code`, which may import this module."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
