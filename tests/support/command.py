"""``softdimo`` as a user starts it: a process of its own, in a process group, on pipes or on a terminal."""

from __future__ import annotations

import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

from support.process import ROOT


class Command:
    """A running ``softdimo``; ``out`` and ``err`` are what it has written so far (on a terminal, all out)."""

    def __init__(self, *arguments: str, terminal: bool = False) -> None:
        environment = {name: v for name, v in os.environ.items() if name != "COLUMNS"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        master, slave = pty.openpty() if terminal else (None, subprocess.PIPE)
        if terminal:
            ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "softdimo_command.py"), *arguments],
            stdin=slave if terminal else subprocess.DEVNULL,
            stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        self._texts: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
        self._readers = []
        if master is not None:
            os.close(slave)
            self._read("out", master)
        else:
            assert self.process.stdout is not None
            assert self.process.stderr is not None
            self._read("out", self.process.stdout.fileno())
            self._read("err", self.process.stderr.fileno())

    def _read(self, name: str, descriptor: int) -> None:
        def follow() -> None:
            while True:
                try:
                    data = os.read(descriptor, 65536)
                except OSError:  # the terminal's other end is closed
                    return
                if not data:
                    return
                self._texts[name] += data

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        self._readers.append(reader)

    @property
    def out(self) -> str:
        return self._texts["out"].decode()

    @property
    def err(self) -> str:
        return self._texts["err"].decode()

    def wait_until(self, ready: Callable[[], bool], *, seconds: float = 120) -> None:
        limit = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"it ended: {self.out}\n{self.err}"
            assert time.monotonic() < limit, f"it takes too long: {self.out}\n{self.err}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C on a terminal: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM to the command alone, as a supervisor sends it."""
        self.process.terminate()

    def end(self, *, seconds: float = 240) -> int:
        """The exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        for reader in self._readers:
            reader.join(10)
        return code


def run(*arguments: str, terminal: bool = False, seconds: float = 240) -> Command:
    """A command that has ended."""
    command = Command(*arguments, terminal=terminal)
    command.end(seconds=seconds)
    return command


def checkpoint_files(folder: Path) -> list[Path]:
    """Every file of the checkpoints below ``folder``."""
    return sorted(path for path in folder.glob("**/checkpoints/step_*/*") if path.is_file())
