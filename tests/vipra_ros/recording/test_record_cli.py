"""Ending `vipra record` never drops an episode unasked."""

import os
import signal
from types import SimpleNamespace

import pytest

from vipra_ros.recording import cli


class Recorder:
    """A monitor that knows one recorder; at each look at its status the next thing of `script` happens."""

    def __init__(self, state: str, *script):
        self.state, self.looks, self._script = state, 0, iter(script)

    def status(self, node):
        self.looks += 1
        if signal_ := next(self._script, None):
            os.kill(os.getpid(), signal_)
        return SimpleNamespace(
            values={
                "state": self.state,
                "message": "",
                "count": "3",
                "target": "200",
                "length_s": "4.0",
                "last_length_s": "4.0",
                "sync_p99_ms": "1.0",
                "repeated": "0",
                "warnings": "",
            }
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_interrupt_asks_and_the_second_ends(number, monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "")
    before = signal.getsignal(number)
    recorder = Recorder("PENDING", None, number, None, None, number)
    assert cli.run(recorder) == 0
    assert recorder.looks == 5
    assert "an episode is pending: keep it first, or press q again to drop it" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    recorder = Recorder("IDLE", None, number)
    assert cli.run(recorder) == 0 and recorder.looks == 2


def test_the_end_of_the_input_ends_it(monkeypatch):
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "\x04")
    recorder = Recorder("RECORDING")
    assert cli.run(recorder) == 0 and recorder.looks == 2
