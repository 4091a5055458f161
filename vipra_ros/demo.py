"""`vipra demo`: the whole system on one machine with two simulated arms, and a report of what happened."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from config.robot import PRESETS, safety_of
from simulation.check import Limits, violations
from simulation.control import SimulationControl, SimulationError
from simulation.state import SharedState, StateError
from vipra_ros import bringup
from vipra_ros.live import View, rows
from vipra_ros.monitor import CallFailed, Monitor
from vipra_ros.process import Child, ProcessError, Slot, reserve_slot, signals_raise, wait_for
from vipra_ros.report import page, plots, summary
from vipra_ros.report.logs import ArmsLog, LogError, read_requests
from vipra_ros.report.video import Video, jpeg
from vipra_ros.up import run_folder, wait_ready

ROBOT = "sim_bimanual"
# Appended chunks start where the last one ends, which only actions relative to the state can do.
SHIPPED = {"observation": "vipra_tiny_bimanual", "append": "vipra_tiny_bimanual_relative"}
ENDED = ("FAULT", "STOPPED")  # states of the arms that nothing but a recovery leaves
STALLS = ("clock", "deadman", "frozen")  # faults of a machine that was too busy, not of the robot
RECOVERIES = 3  # as often does the demo do what an operator would: recover, start
SLOWEST = 4.0  # wall seconds a second of control may take before the demo gives up


@dataclass(frozen=True)
class Settings:
    duration_s: float = 60.0  # of control, on the executor clock
    rate_hz: float = 22.0
    replan_after: int = 7
    mode: str = "asynchronous"
    anchor: str = "observation"
    min_cycle_s: float = 0.0
    inject_latency_ms: float = 0.0
    seed: int = 0
    policy: str = SHIPPED["observation"]

    def following(self, preset: str | None, policy: str | None) -> "Settings":
        """With one of the paper's protocols, and `policy` or the shipped one that fits."""
        fields = dict(PRESETS.get(preset, {}))
        if "action_rate_hz" in fields:
            fields["rate_hz"] = fields.pop("action_rate_hz")
        settings = replace(self, **fields)
        fits = settings.anchor if settings.mode == "asynchronous" else "observation"
        return replace(settings, policy=policy or SHIPPED[fits])


@dataclass
class Session:
    """What was seen from outside while the policy was in command. Times on the executor clock."""

    started_s: float = 0.0
    ended_s: float = 0.0
    real_time_factor: float = 0.0
    frames_per_second: float = 0.0
    recoveries: tuple[str, ...] = ()  # why, each time
    arms: dict[str, str] | None = None  # last status values of the arms node
    policy: dict[str, str] | None = None


def run(settings: Settings, out: Path | None = None) -> int:
    """0 when the run worked and its report is written; otherwise 1 and the reason in one line."""
    folder = (out or run_folder("demo")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        slot = reserve_slot()
        stack.callback(slot.release)
        stack.enter_context(signals_raise())
        view = stack.enter_context(View("vipra demo"))
        try:
            graph = describe(settings, slot, folder)
            session, stills, problem = _drive(settings, slot, graph, folder, view)
            report, problem = _report(settings, graph, session, stills, problem, folder)
            view.say(in_one_line(report))
        except KeyboardInterrupt:
            view.say("interrupted: everything is stopped, no report")
            return 130
        except (ProcessError, SimulationError, StateError, LogError) as error:
            view.say(f"demo failed: {error}")
            return 1
        if problem:
            view.say(f"demo failed: {problem}; report: {folder / 'report.html'}")
            return 1
        view.say(f"report: {folder / 'report.html'}")
        return 0


def describe(settings: Settings, slot: Slot, folder: Path) -> bringup.Graph:
    """The bimanual graph on addresses of its own."""
    given = {
        "robot": ROBOT,
        "policy": settings.policy,
        "server": f"tcp://{slot.host(3)}:5555",
        "rate": settings.rate_hz,
        "replan_after": settings.replan_after,
        "mode": settings.mode,
        "anchor": settings.anchor,
        "inject_latency_ms": settings.inject_latency_ms,
        "seed": settings.seed,
        "run_dir": str(folder),
    }
    overrides = {
        "policy.min_cycle_s": settings.min_cycle_s,
        "simulation.name": slot.name,
        "arms.left.hostname": slot.host(1),
        "arms.right.hostname": slot.host(2),
    }
    return bringup.describe("bimanual", given, overrides)


def _drive(
    settings: Settings, slot: Slot, graph: bringup.Graph, folder: Path, view: View
) -> tuple[Session, list[np.ndarray], str | None]:
    """Start, run for the duration, stop. Returns what was seen, stills, and why it ended early, if it did."""
    environment = {"ROS_DOMAIN_ID": str(slot.domain)}
    video = Video(folder / "front_camera.mp4", graph.robot.camera.rate_hz)
    view.say(f"starting {', '.join(p.name for p in graph.processes)}; logs in {folder / 'logs'}")
    with contextlib.ExitStack() as stack:
        stack.callback(video.close)
        children = stack.enter_context(bringup.running(graph, folder / "logs", environment))
        monitor = stack.enter_context(Monitor(slot.domain, "LOCALHOST"))
        wait_ready(monitor, children)
        os.nice(5)  # the table and the film must not cost the robot its time
        control = SimulationControl(slot.name)
        stack.callback(control.close)
        state = SharedState.attach(slot.name, 5.0)
        stack.callback(state.close)
        control.record_start(max_duration_s=settings.duration_s + 60.0)
        monitor.watch_images(lambda message: video.add(*_picture(message)))
        if _stalled(monitor):
            _recover(monitor, children)
        view.say(monitor.call("/policy/start", 20.0))
        session, problem = _watch(settings, monitor, children, state.time, view)
        with contextlib.suppress(ProcessError):
            monitor.call("/policy/stop", 5.0)
            wait_for(lambda: _state(monitor) not in ("RUNNING", "ALIGNING"), 5.0, "arms at rest", children)
        session.arms = dict(monitor.status("arms").values)
        session.policy = dict(monitor.status("policy").values)
        control.record_stop(folder / "simulator.npz")
        session.frames_per_second = (video.frames - 1) / video.duration_s if video.duration_s > 0 else 0.0
    return session, video.stills, problem


def _watch(
    settings: Settings, monitor: Monitor, children: list[Child], now: Callable[[], float], view: View
) -> tuple[Session, str | None]:
    """Show the state until the duration is over, or something ends the run; second result: what."""

    def arms_running() -> None:
        wait_for(lambda: _state(monitor) in ("RUNNING", *ENDED), 60.0, "arms running", children)

    arms_running()
    session, wall = Session(started_s=now()), time.monotonic()
    problem = None
    while problem is None and now() - session.started_s < settings.duration_s:
        time.sleep(0.2)
        left = settings.duration_s - (now() - session.started_s)
        view.show({**rows(monitor), "time left": f"{max(left, 0):.0f} s"})
        arms = monitor.status("arms")
        if _stalled(monitor) and len(session.recoveries) < RECOVERIES:
            session.recoveries += (arms.message,)
            view.say(f"{arms.message}: this machine is too busy; recovering")
            _recover(monitor, children)
            view.say(monitor.call("/policy/start", 20.0))
            arms_running()
        elif arms.values["state"] in ENDED:
            problem = f"the arms stopped: {arms.message}"
        elif _state(monitor, "policy") == "STOPPED":
            problem = f"the policy stopped: {monitor.status('policy').message}"
        elif time.monotonic() - wall > SLOWEST * settings.duration_s + 30:
            problem = (
                f"this machine is too slow: {left:.0f} s of control left after {SLOWEST:g} times the duration"
            )
        for child in children:
            child.check()
    session.ended_s = now()
    session.real_time_factor = (session.ended_s - session.started_s) / (time.monotonic() - wall)
    return session, problem


def _stalled(monitor: Monitor) -> bool:
    arms = monitor.status("arms").values
    return arms["state"] == "FAULT" and arms["code"] in STALLS


def _recover(monitor: Monitor, children: list[Child]) -> None:
    """As an operator would, once the arms rest. Raises ProcessError when they do not recover."""

    def recovered() -> bool:
        with contextlib.suppress(CallFailed):
            return bool(monitor.call("/arms/recover", 30.0))
        return False

    wait_for(recovered, 20.0, "arms recovered", children, poll_s=0.3)


def _state(monitor: Monitor, node: str = "arms") -> str | None:
    status = monitor.status(node)
    return status and status.values.get("state")


def _picture(message) -> tuple[np.ndarray, float]:
    """rgb [h, w, 3] and stamp in s of a sensor_msgs/Image."""
    rgb = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
    return rgb, message.header.stamp.sec + message.header.stamp.nanosec * 1e-9


def _report(
    settings: Settings,
    graph: bringup.Graph,
    session: Session,
    stills: list[np.ndarray],
    problem: str | None,
    folder: Path,
) -> tuple[dict, str | None]:
    """Write report.json, report.html and the plots; the second result says why the run does not count."""
    whole = ArmsLog.read(folder / "arms.npz")
    log = whole.between(session.started_s, session.ended_s)
    requests = read_requests(folder / "policy.jsonl")
    with np.load(folder / "simulator.npz", allow_pickle=False) as record:
        beyond = violations(record, Limits.of(safety_of(graph.robot)))
    report = summary.summarise(
        log,
        requests,
        reference_rate_hz=graph.robot.control.reference_rate_hz,
        interventions=json.loads((session.arms or {}).get("interventions") or "{}"),
        violations=sum(sum(beyond.get(kind, {}).values()) for kind in ("position", "velocity")),
        real_time_factor=session.real_time_factor,
        frames_per_second=session.frames_per_second,
    )
    problem = problem or summary.failure(
        report, log, settings.duration_s, graph.robot.control.reference_rate_hz, bool(session.recoveries)
    )
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    drawn = []
    if len(log.t):
        plots.joints(log, folder / "joints.png")
        plots.timing(log, requests, folder / "timing.png")
        drawn = [
            ("Commanded and measured joint positions", folder / "joints.png"),
            ("Timing", folder / "timing.png"),
        ]
    middle = [stills[i] for i in sorted({0, len(stills) // 2, len(stills) - 1})] if stills else []
    page.render(
        folder / "report.html",
        "ViPRA on two simulated Franka arms",
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {settings.duration_s:g} s at {settings.rate_hz:g} actions/s",
        problem,
        report,
        asdict(settings),
        notes(settings, graph, session),
        drawn,
        [jpeg(still) for still in middle],
        "front_camera.mp4" if stills else None,
    )
    return report, problem


def in_one_line(report: dict) -> str:
    """What an operator wants to know first."""
    latency, error = report["chunk_latency_ms"], report["tracking_error_rad"]
    return (
        f"{report['control_ticks']} control ticks, {report['late_ticks']} late, "
        f"{report['starved_ticks']} starved; chunk latency p50 {latency['p50']} ms, p99 {latency['p99']} ms; "
        f"tracking error rms {error['rms']} rad; "
        f"limit violations {report['limit_violations_1khz']}; real-time factor {report['real_time_factor']}"
    )


def notes(settings: Settings, graph: bringup.Graph, session: Session) -> list[str]:
    """What a reader must know to read the numbers right."""
    shown = load(Embodiment, graph.robot.embodiment).rate_hz
    text = [
        "Simulated arms (franky-sim on MuJoCo) and a rendered camera; the robot code path is the real one.",
        "Real-time factor: simulated seconds a second; ticks, latency and frames count in simulated time.",
    ]
    if settings.rate_hz > shown:
        speed = settings.rate_hz / shown
        text.append(
            f"{settings.rate_hz:g} actions/s: {shown:g} Hz demonstrations play {speed:.2f} times as fast."
        )
    if settings.mode == "asynchronous" and settings.anchor == "append":
        text.append("anchor append: open loop within a chunk; each chunk starts where the last one ends.")
    if session.recoveries:
        why = "; ".join(session.recoveries)
        text.append(
            f"This machine stalled and the arms stopped {len(session.recoveries)} times, rightly ({why}); "
        )
        text[-1] += "the demo recovered them and went on."
    if settings.inject_latency_ms:
        text.append(f"{settings.inject_latency_ms:g} ms were added to every inference.")
    return text
