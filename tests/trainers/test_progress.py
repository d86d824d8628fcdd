"""Progress: a bar on a terminal, few plain lines elsewhere, and nothing that can end a run."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import termios
from contextlib import suppress

import pytest

from softdimo_fast.trainers.progress import NoProgress, Progress, TerminalProgress


class Clock:
    """Seconds, by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_lines_at_each_tenth() -> None:
    stream, clock = io.StringIO(), Clock()
    progress: Progress = TerminalProgress(600, "teacher", stream=stream, clock=clock)
    for step in range(1, 601):
        clock.now += 0.02
        if step == 300:
            progress.update(step, loss=0.123456, digits="ok")
        else:
            progress.update(step)
    progress.close()
    progress.close()
    assert lines(stream)[0] == "teacher: 60/600 steps (10 %), 50.0 steps/s, 0:11 left"
    assert lines(stream)[4] == (
        "teacher: 300/600 steps (50 %), 50.0 steps/s, 0:06 left, loss 0.1235, digits ok"
    )
    assert lines(stream)[-1] == "teacher: done after 0:12, loss 0.1235, digits ok"
    assert len(lines(stream)) == 10
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_lines_every_15_seconds_when_it_is_slow() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = TerminalProgress(10_000, "gan", stream=stream, clock=clock)
    for step in range(1, 21):
        clock.now += 4.0
        progress.update(step)
    progress.close()
    assert lines(stream)[0] == "gan: 4/10000 steps (0 %), 4.0 s/step, 11:06:24 left"
    assert len(lines(stream)) == 6
    assert lines(stream)[-1] == "gan: stopped at 20/10000 after 1:20"


def test_rates_of_a_resumed_run_count_from_its_first_step() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = TerminalProgress(100, "x", first=50, stream=stream, clock=clock)
    progress.update(50)
    assert lines(stream) == []
    clock.now = 2.0
    progress.update(60)
    assert lines(stream) == ["x: 60/100 steps (60 %), 5.0 steps/s, 0:08 left"]


def test_a_step_at_once_needs_no_rate() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(2, "x", stream=stream, clock=Clock())
    progress.update(1)
    progress.update(2)
    progress.close()
    assert lines(stream) == ["x: 1/2 steps (50 %)", "x: done after 0:00"]
    TerminalProgress(0, "nothing", stream=stream).close()
    assert lines(stream)[-1] == "nothing: done after 0:00"


def test_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalProgress(0, "nothing").close()
    assert capsys.readouterr().err == "nothing: done after 0:00\n"


def test_a_closed_stream_ends_the_display_not_the_run() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(2, "x", stream=stream)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.write("")
    read, write = os.pipe()
    os.close(read)
    broken = os.fdopen(write, "w")
    for display in (progress, TerminalProgress(2, "x", stream=broken)):
        display.update(1)
        display.close()
    with pytest.raises(BrokenPipeError):
        broken.close()


@pytest.mark.parametrize("columns", [0, 90, 160])
def test_a_bar_on_a_terminal(columns: int) -> None:
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with os.fdopen(terminal, "w") as stream:
        progress = TerminalProgress(100, "dimo", stream=stream, first=20)
        for step in range(21, 101):
            progress.update(step, loss=1 / step)
        progress.close()
    content = b""
    with suppress(OSError):  # the end of a terminal's output
        while part := os.read(main, 100_000):
            content += part
    os.close(main)
    shown = content.decode()
    assert "dimo:  20%|" in shown
    assert "dimo: 100%|" in shown
    assert "100/100 [00:00<00:00" in shown
    assert "loss 0.01" in shown
    assert shown.endswith("\r\n")
    assert shown.count("\n") == 1
    assert all(len(line) <= (columns or 80) for line in re.split(r"[\r\n]+", shown))


def test_plain_lines_do_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = io.StringIO()
    TerminalProgress(0, "x", stream=stream).close()
    assert lines(stream) == ["x: done after 0:00"]


def test_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = NoProgress()
    progress.update(1, loss=2.0)
    progress.close()
    assert capsys.readouterr() == ("", "")
