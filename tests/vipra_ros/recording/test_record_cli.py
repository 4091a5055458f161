"""Ending `vipra record` never drops an episode unasked."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from config.loading import ConfigError, parse
from config.recording import Recording
from vipra_ros.monitor import CallFailed
from vipra_ros.recording import cli
from vipra_ros.recording.keyboard import forget_typed, raw_keys, read_key, verb


class Recorder:
    """A monitor that knows one recorder; at each look at its status the next thing of `script` happens."""

    silent_s = 0.0

    def __init__(self, state: str, *script):
        self.state, self.looks, self.calls, self._script = state, 0, [], iter(script)

    def status(self, node):
        self.looks += 1
        if signal_ := next(self._script, None):
            os.kill(os.getpid(), signal_)
        return SimpleNamespace(
            heard_s=time.monotonic() - self.silent_s,
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
                "task": "stack the cups",
                "set_up": "",
            },
        )

    def call(self, service, timeout_s):
        self.calls.append(service)
        return "discarded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_interrupt_asks_and_the_second_ends(number, monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "")
    before = signal.getsignal(number)
    recorder = Recorder("PENDING", None, number, None, None, number)
    assert cli.run(recorder) == 0
    assert recorder.looks == 5 and recorder.calls == ["/recorder/discard"], (
        "its recorder stays and would go on"
    )
    recorder = Recorder("PENDING", number, None, number)
    assert cli.run(recorder, [SimpleNamespace(check=lambda: None)]) == 0 and not recorder.calls
    assert "an episode is pending: keep it first, or press q again to drop it" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    recorder = Recorder("IDLE", None, number)
    assert cli.run(recorder) == 0 and recorder.looks == 2


class Called(Recorder):
    """Notes the services that are called; an asked-for episode is flagged the first time."""

    def call(self, service, timeout_s):
        self.calls.append(service)
        if len(self.calls) == 1:
            raise CallFailed(f"{service}: flagged: camera frozen: keep again to keep it all the same")
        return "saving"


@pytest.mark.parametrize("key, held", [("k", ["/recorder/keep"]), ("q", [])])
def test_a_key_that_is_held_down_confirms_nothing(key, held, monkeypatch, capsys):
    """Repeated thirty times a second after half a second, then, after a pause, pressed again."""
    clock = [0.0]
    keys = [(t, key) for t in (0.0, 0.5, *np.arange(0.53, 1.5, 0.03), 3.0)] + [(4.0, "\x04"), (4.1, "\x04")]

    def read_key(timeout_s):
        clock[0], pressed = keys.pop(0)
        return pressed

    monkeypatch.setattr(cli, "read_key", read_key)
    recorder = Called("PENDING")
    assert cli.run(recorder, now=lambda: clock[0]) == 0
    assert recorder.calls == [*held * 2, "/recorder/discard"]
    assert ("flagged" in capsys.readouterr().out) == (key == "k")


def test_a_key_held_down_while_the_recorder_takes_its_time_is_no_second_wish(monkeypatch):
    """Each of them is read only after the answer, a second later."""
    clock = [0.0]
    terminal = [(t, "k") for t in np.arange(0.0, 1.2, 0.03)] + [(9.0, "\x04"), (9.1, "\x04")]

    def read_key(timeout_s):
        pressed, key = terminal.pop(0)
        clock[0] = max(clock[0], pressed)
        return key

    def forget_typed():
        while terminal[0][0] < clock[0]:
            terminal.pop(0)

    class Slow(Called):
        def call(self, service, timeout_s):
            clock[0] += 1.0
            return super().call(service, timeout_s)

    monkeypatch.setattr(cli, "read_key", read_key)
    monkeypatch.setattr(cli, "forget_typed", forget_typed)
    recorder = Slow("PENDING")
    assert cli.run(recorder, now=lambda: clock[0]) == 0
    assert recorder.calls == ["/recorder/keep", "/recorder/discard"]


def test_keys_pressed_while_nobody_read_are_dropped_at_a_terminal_only(tmp_path):
    leader, follower = os.openpty()
    with os.fdopen(follower, "rb", buffering=0) as terminal, raw_keys(terminal):
        os.write(leader, b"kkk")
        assert read_key(5.0, terminal) == "k"
        forget_typed(terminal)
        assert read_key(0.05, terminal) == ""
    os.close(leader)
    (tmp_path / "keys").write_bytes(b"kd")
    with (tmp_path / "keys").open("rb", buffering=0) as script:
        forget_typed(script)
        assert read_key(1.0, script) == "k", "what a script types is meant"


def test_a_recorder_that_fell_silent_is_told(monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "show", shown.append)
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "\x04")
    recorder = Recorder("RECORDING")
    recorder.silent_s = 3.2
    assert cli.run(recorder) == 0
    assert shown[0] == "the recorder is silent for 3 s: look at it"


def test_an_arrow_or_function_key_means_nothing(tmp_path):
    """Left sends ESC [ D and F3 ESC O R: neither discards or retries."""
    for sent in (b"\x1b[D", b"\x1bOR", b"\x1b[1;5D", b"\x1b[[D"):
        path = tmp_path / "keys"
        path.write_bytes(sent)
        with path.open("rb") as file:
            key = read_key(0.1, file)
            assert key == "\x1b" and verb(key, "RECORDING") is None
            assert read_key(0.1, file) == "\x04", "nothing of it is left"


def test_the_end_of_the_input_ends_it(monkeypatch):
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "\x04")
    recorder = Recorder("RECORDING")
    assert cli.run(recorder) == 0 and recorder.looks == 2


@pytest.mark.parametrize("options", [["--task", "stack the cups"], ["--raw"], ["--target", "100"]])
def test_options_that_a_running_recorder_would_not_hear_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        cli.main(options)
    assert f"{options[0]} is for a recorder started here: name a FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["stack_cup", "mine.yaml", "stack-cups", "tasks/mugs", " stack_cup "])
def test_a_task_file_that_is_not_there_is_no_instruction(task):
    with pytest.raises(ConfigError, match=r"recorder: task: .*(known tasks: .*stack_cups|no such file)"):
        parse(Recording, {"task": task}, "recorder")
    assert Recording(task="stack cup").task == "stack cup"


def test_what_to_lay_out_is_said_before_every_attempt(monkeypatch, capsys):
    monkeypatch.setattr(cli, "read_key", lambda timeout_s: "")
    states = ["IDLE", "IDLE", "RECORDING", "PENDING", "IDLE", "IDLE"]
    recorder = Recorder("IDLE")
    shown = recorder.status

    def status(node):
        recorder.state = states.pop(0) if states else "IDLE"
        if not states:
            os.kill(os.getpid(), signal.SIGINT)
        now = shown(node)
        now.values |= {"task": "stack the red cup on the blue cup", "set_up": "Two cups.\nred cup: x 50 cm"}
        return now

    recorder.status = status
    assert cli.run(recorder) == 0
    said = "set up for episode 4: stack the red cup on the blue cup\n  Two cups.\n  red cup: x 50 cm\n"
    assert capsys.readouterr().out.count(said) == 2
