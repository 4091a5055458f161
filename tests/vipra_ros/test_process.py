"""Child processes get ready, die loudly and never outlive us."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vipra_ros.process import (
    Child,
    ProcessError,
    domain_is_quiet,
    free_port,
    port_is_free,
    reserve_slot,
    signals_raise,
    stop_all,
    wait_for,
)

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]


def child(tmp_path, code, name="worker"):
    return Child(name, [sys.executable, "-c", code], tmp_path / f"{name}.log")


def alive(pid):
    """Running, and not a zombie waiting for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, or going while it is read
        return False


def gone(pid, timeout_s=30.0):
    return wait_for(lambda: not alive(pid), timeout_s, f"end of {pid}")


def test_output_shows_readiness(tmp_path):
    worker = child(tmp_path, "import time; print('ready now'); time.sleep(60)")
    try:
        assert wait_for(lambda: worker.find(r"^ready (\w+)"), 30, "worker", [worker]).group(1) == "now"
        worker.check()
    finally:
        worker.stop()


def test_death_is_reported_with_the_end_of_the_log(tmp_path):
    worker = child(tmp_path, "import sys; sys.exit('no such camera')")
    with pytest.raises(ProcessError, match=r"exit status 1(.|\n)*no such camera"):
        wait_for(lambda: False, 30, "worker", [worker])


def test_killed_child_is_reported_by_signal(tmp_path):
    worker = child(tmp_path, "import time; time.sleep(60)")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match="SIGKILL"):
        wait_for(lambda: False, 30, "worker", [worker])


def test_waiting_ends_with_what_was_waited_for(tmp_path):
    with pytest.raises(ProcessError, match=r"the moon: not within 0\.1 s"):
        wait_for(lambda: False, 0.1, "the moon")


def test_stop_interrupts_first(tmp_path):
    code = "import time\nprint('up')\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('held the arms')"
    worker = child(tmp_path, code)
    wait_for(lambda: worker.find("up"), 30, "worker", [worker])
    assert worker.stop() == 0
    assert worker.find("held the arms")


def test_stop_escalates_to_kill_and_takes_the_whole_group(tmp_path):
    stubborn = (
        "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)];"
        "print('up', flush=True); time.sleep(60)"
    )
    code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {stubborn!r}]);"
        f"print(p.pid); {stubborn}"
    )
    worker = child(tmp_path, code)
    grandchild = int(wait_for(lambda: worker.find(r"^(\d+)$"), 30, "worker", [worker]).group(1))
    wait_for(lambda: worker.log.read_text().count("up") == 2, 30, "both up", [worker])
    assert worker.stop(interrupt_s=0.2, terminate_s=0.2) == -signal.SIGKILL
    gone(grandchild)


def test_all_are_stopped_even_if_one_is_gone(tmp_path):
    workers = [child(tmp_path, "import time; time.sleep(60)", f"worker{i}") for i in range(3)]
    os.kill(workers[1].pid, signal.SIGKILL)
    stop_all(workers)
    assert all(w.returncode() is not None for w in workers)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_do_not_outlive_their_launcher(tmp_path, end):
    launcher = (
        "import sys, time; from pathlib import Path; from vipra_ros.process import Child\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"c = Child('worker', sleep, Path({str(tmp_path / 'log')!r}))\n"
        "print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = int(parent.stdout.readline())
    parent.send_signal(end)
    parent.wait(30)
    gone(worker)


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])  # the latter: a shell's `&` started it
def test_any_module_can_be_run_so_that_it_ends_with_its_parent(tmp_path, handler):
    (tmp_path / "stays.py").write_text(
        "import os, sys, time; print(os.getpid(), sys.argv[1]); time.sleep(60)"
    )
    launcher = (
        f"import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.{handler})\n"
        "subprocess.Popen([sys.executable, '-u', '-m', 'vipra_ros.process', 'stays', 'here']); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker, argument = parent.stdout.readline().split()
    assert argument == "here"
    parent.terminate()
    parent.wait(30)
    gone(int(worker))


def test_interrupt_reaches_a_child_of_a_launcher_that_ignores_it(tmp_path):
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's `&` leaves it
    try:
        worker = child(tmp_path, "import time; print('up'); time.sleep(60)")
    finally:
        signal.signal(signal.SIGINT, old)
    wait_for(lambda: worker.find("up"), 30, "worker", [worker])
    assert worker.stop(60) == -signal.SIGINT  # the interrupt was enough


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_and_the_next_do_not_disturb_the_end(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), signals_raise():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # in the middle of stopping
    assert signal.getsignal(number) == before


def test_two_runs_share_nothing():
    first, second = reserve_slot(), reserve_slot()
    try:
        assert first.domain != second.domain and first.name != second.name and first.host(1) != second.host(1)
        assert domain_is_quiet(first.domain) and port_is_free(first.host(3), 5555)
    finally:
        first.release()
        second.release()


def test_full_machine_says_so():
    slot = reserve_slot()
    try:
        with pytest.raises(ProcessError, match="in use"):
            reserve_slot([slot.number])
    finally:
        slot.release()


def test_free_port_can_be_bound():
    assert port_is_free("127.0.0.1", free_port())
