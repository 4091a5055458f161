"""`vipra serve` says what it loads, and leaves with one line and a status when it cannot go on."""

import io
import json
import logging
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from policy_server import server
from policy_server.client import PolicyClient, RequestFailed
from policy_server.server import StartUp
from tests.policy_server.policies import frames
from tests.policy_server.test_client import ServerProcess, address  # noqa: F401

pytestmark = pytest.mark.live


def test_without_a_terminal_each_stage_logs_its_begin_and_its_end(caplog):
    caplog.set_level(logging.INFO, "policy_server")
    start_up = StartUp(bars=False)
    for part in range(101):
        start_up.show("reading checkpoint", part * 2**26, 100 * 2**26)
    start_up.show("capturing graphs", 4, 4)
    start_up.close()
    assert [(record.message, record.fields["done"]) for record in caplog.records] == [
        ("reading checkpoint", "0.0/6.2 GiB"),
        ("reading checkpoint", "6.2/6.2 GiB"),
        ("capturing graphs", "4/4"),
    ]


def test_on_a_terminal_each_stage_is_a_bar(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(server, "Console", lambda stderr: screen)
    start_up = StartUp(bars=True)
    start_up.show("reading checkpoint", 0, 2**25)
    start_up.show("reading checkpoint", 2**25, 2**25)
    start_up.show("warming up", 1, 5)
    start_up.close()
    start_up.close()
    drawn = screen.file.getvalue()
    start_up.show("capturing graphs", 0, 4)
    assert screen.file.getvalue() == drawn
    assert (
        "reading checkpoint" in drawn
        and "32.0/32.0 MiB" in drawn
        and "warming up" in drawn
        and "1/5" in drawn
    )


def test_a_failed_device_is_one_line_and_exit_status_3_and_a_new_process_serves_again(address):  # noqa: F811
    with (
        ServerProcess(address, stderr=subprocess.PIPE) as first,
        PolicyClient(address, timeout_s=10.0) as client,
    ):
        client.hello(10)
        with pytest.raises(RequestFailed, match="inference_failed"):
            client.infer(frames(), "lost")
        said = first.process.stderr.read()
        assert first.process.wait(20) == server.DEVICE_FAILED == 3
        failed = [line for line in said.splitlines() if "ERROR" in line]
        assert len(failed) == 1 and "new process" in failed[0] and "illegal memory access" in failed[0]
        assert "Traceback" not in said
        with ServerProcess(address):
            client.hello(10)
            assert (client.infer(frames(), "stack", seed=4).actions == 4).all()


def test_a_checkpoint_that_cannot_be_served_is_one_line_and_exit_status_1(tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({"checkpoint": str(tmp_path / "nowhere"), "device": "cpu"}))
    command = [sys.executable, "-m", "policy_server.server", "--policy", str(policy), "--log-json"]
    done = subprocess.run(
        [*command, "--bind", "tcp://127.0.0.1:*"], capture_output=True, text=True, timeout=120
    )
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert done.returncode == 1 and done.stdout == ""
    assert last["level"] == "error" and last["message"].startswith(
        f"stopped: {tmp_path}/nowhere does not exist"
    )
    assert "exception" not in last
