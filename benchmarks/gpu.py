"""Everything there is to check and measure on a GPU, in one command that can be stopped and run again.

    python -m benchmarks.gpu --out DIR [--wheels DIR] [--skip STEP ...] [--minutes M]

    tests          pytest -k cuda: graphs against eager, fp8 against bf16, batch against single
    device         copy bandwidth, matmul rates, floors
    chunk_latency  every way of computing a chunk, with and without prefetch
    batching       chunks a second at batch 1 to 16, bf16 and fp8
    accuracy       what bf16 and fp8 do to the actions
    startup        load times, host and device memory
    fleet          robots at 22 Hz on a real server, bf16
    fleet_fp8      the same in fp8

Each step is a process of its own with its own time limit; its result is DIR/STEP.json, its output
DIR/STEP.log. A step whose result exists is not run again, so a second call goes on where the first stopped;
--minutes stops before a step whose limit would not fit. All steps together are meant to stay under 20 minutes
on an H200. The end is DIR/summary.md: targets against measurements, and every table, ready for
docs/benchmarks.md.

Without a GPU, `--device cpu --model 100m` runs the same steps for the CPU's tables, in about an hour.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

NEEDS = {  # import name -> package
    "torch": "torch",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "rich": "rich",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
    "cv2": "opencv-python-headless",
    "zmq": "pyzmq",
    "msgpack": "msgpack",
}
CPU_LIMIT_S = 3600  # a step on a CPU
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One process: on a GPU `limit_s` kills it; `needs` beyond what all steps need."""

    name: str
    module: str
    limit_s: int
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False


STEPS = (
    Step("tests", "pytest", 240, needs=("pytest", "pytest_timeout", "hypothesis", "cv2", "zmq")),
    Step("device", "benchmarks.device", 90),
    Step("chunk_latency", "benchmarks.chunk_latency", 400, needs=("transformers",)),
    Step("batching", "benchmarks.batching", 240),
    Step("accuracy", "benchmarks.accuracy", 120),
    Step("startup", "benchmarks.startup", 240),
    Step("fleet", "benchmarks.fleet", 200, needs=("zmq", "cv2")),
    Step("fleet_fp8", "benchmarks.fleet", 200, ("--fp8",), ("zmq", "cv2"), needs_gpu=True),
)
TITLED = ("chunk_latency", "batching", "accuracy", "startup")  # the others' columns are their keys
ALWAYS = ("torch", "numpy", "yaml", "rich", "pydantic", "msgpack", "safetensors", "tokenizers")


def missing(names, path: list[str]) -> list[str]:
    """Packages of `names` that cannot be found, looking at `path` too."""
    sys.path[:0] = path
    found = [NEEDS[name] for name in names if importlib.util.find_spec(name) is None]
    del sys.path[: len(path)]
    return found


def install(wheels: Path, site: Path) -> None:
    """Unpack every wheel of a folder beside the results; no network, no change to the interpreter."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(site), *files], check=True)


def command(step: Step, arguments: argparse.Namespace, result: Path) -> list[str]:
    if step.name == "tests":
        folders = ["tests/models", "tests/policy_server"]
        options = ["-k", "cuda", "-q", "-rs", f"--junitxml={result.with_suffix('.xml')}"]
        return [sys.executable, "-m", "pytest", *options, *folders]
    out = [sys.executable, "-m", step.module, "--model", arguments.model, "--device", arguments.device]
    out += ["--json", str(result), *step.options]
    if arguments.repeats:
        out += ["--repeats", str(arguments.repeats)]
    return out


def run(step: Step, arguments: argparse.Namespace, limit_s: float, site: Path) -> str:
    """Run one step; what became of it."""
    result, log = arguments.out / f"{step.name}.json", arguments.out / f"{step.name}.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command(step, arguments, result),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # also servers it started: the next step needs the GPU
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"stopped after {limit_s:.0f} s"
            raise
    took = f"{time.monotonic() - begin:.0f} s"
    if step.name == "tests" and process.returncode in (0, 5):  # 5: nothing selected
        result.write_text(json.dumps(tests(result.with_suffix(".xml"))))
    if process.returncode or not result.exists():
        tail = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        return f"failed with status {process.returncode} after {took}: {tail[:200]}"
    return f"done in {took}"


def tests(report: Path) -> dict:
    """Counts of a pytest run, and why tests were skipped."""
    suite = ET.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors")}
    reasons = sorted({element.get("message") for element in suite.iter("skipped")})
    left_out = {"left_out": int(suite.get("skipped")), "why": "; ".join(reasons)}
    return {"benchmark": "tests", "rows": [counts | left_out]}


def targets(results: dict[str, dict]) -> list[dict]:
    """The numbers to reach on one H200, beside what was measured; a dash where nothing was."""

    def row(name: str, **wanted) -> dict:
        rows = results.get(name, {}).get("rows", [])
        return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), {})

    def chunk(variant: str) -> dict:
        return row("chunk_latency", variant=variant, prompt_tokens=60, action_dim=8)

    def spread(variant: str) -> float | None:
        found = chunk(variant)
        return found["p99_ms"] / found["p50_ms"] if found.get("p50_ms") else None

    out = [
        {
            "what": f"chunk p50, {what}, ms",
            "target": target,
            "floor": chunk(v).get("floor_ms"),
            "measured": chunk(v).get("p50_ms"),
        }
        for what, v, target in (
            ("bf16", "graph", 50),
            ("fp8", "fp8", 30),
            ("bf16 with prefetch", "prefetch", 43),
            ("fp8 with prefetch", "fp8_prefetch", 26),
        )
    ]
    out += [
        {"what": f"p99 / p50, {what}", "target": "under 1.1", "measured": spread(v)}
        for what, v in (("bf16", "graph"), ("fp8", "fp8"))
    ]
    batch = row("batching", variant="graph", batch=16)
    floor = 16e3 / batch["floor_ms"] if batch.get("floor_ms") else None
    out.append(
        {
            "what": "chunks/s, batch 16, bf16",
            "target": 60,
            "floor": floor,
            "measured": batch.get("chunks_per_s"),
        }
    )
    for name, what, target in (("fleet", "bf16", 16), ("fleet_fp8", "fp8", 28)):
        robots = results.get(name, {}).get("largest_fleet")
        out.append(
            {
                "what": f"robots at 22 Hz, 7/14, p99 at most 280 ms, {what}",
                "target": target,
                "measured": robots,
            }
        )
    memory = row("startup", quantization="none").get("device_gib")
    out.append({"what": "GPU memory, bf16, batch 1, GiB", "target": "under 20", "measured": memory})
    return out


def summary(out: Path, status: dict[str, str]) -> str:
    """The whole result as markdown."""
    from benchmarks import common, device

    results = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    first = next((r for r in results.values() if "device" in r), {})
    text = [", ".join(str(first.get(key)) for key in ("device", "date", "commit", "torch"))]
    text += ["", "\n".join(f"- {name}: {what}" for name, what in status.items()), "", "## Targets", ""]
    text.append(common.markdown(targets(results), {k: k for k in ("what", "target", "floor", "measured")}))
    for name, result in results.items():
        text += ["", f"## {name}", ""]
        if name == "device":
            text.append(f"Copy: {result['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s read and written.\n")
            text.append(common.markdown(result["matmul"], device.RATE_TITLES) + "\n")
            text.append(common.markdown(result["floors"], device.FLOOR_TITLES))
        else:
            rows = [row for row in result["rows"] if not row.get("skipped")]
            titles = {key: key for row in rows for key in row}
            if name in TITLED:
                titles = importlib.import_module(f"benchmarks.{name}").TITLES
            text.append(common.markdown(rows, titles))
            text += ["", *(f"- skipped {reason}" for reason in common.reasons(result["rows"]))]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; kept between calls")
    names = [step.name for step in STEPS]
    parser.add_argument("--skip", nargs="+", default=[], choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="STEP")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages this machine lacks")
    parser.add_argument(
        "--minutes", type=float, default=60, help="on a GPU start nothing that may end later (default: 60)"
    )
    parser.add_argument("--model", choices=("tiny", "100m", "7b"), default="7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="rounds of every benchmark, for a quick look"
    )
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, site = time.monotonic() + 60 * arguments.minutes, arguments.out / "site"
    if arguments.wheels and not site.exists():
        install(arguments.wheels, site)
    path = [str(site)] if site.exists() else []
    if absent := missing(ALWAYS, path):
        print(f"missing packages: {' '.join(absent)}. Bring their wheels: --wheels DIR", file=sys.stderr)
        return 1
    sys.path[:0] = path
    status = {}
    for step in STEPS:
        left, limit_s = end - time.monotonic(), step.limit_s if arguments.device == "cuda" else CPU_LIMIT_S
        if step.name in arguments.skip or step.name not in arguments.only:
            status[step.name] = "skipped as asked"
        elif (arguments.out / f"{step.name}.json").exists():
            status[step.name] = "done before"
        elif absent := missing(step.needs, []):
            status[step.name] = f"skipped, missing packages: {' '.join(absent)}"
        elif step.module.startswith("benchmarks.") and importlib.util.find_spec(step.module) is None:
            status[step.name] = f"skipped, there is no {step.module}"
        elif step.needs_gpu and arguments.device != "cuda":
            status[step.name] = "skipped, needs a GPU"
        elif left < (limit_s if arguments.device == "cuda" else 60):
            status[step.name] = "out of time: run this command again"
        else:
            print(f"{step.name} ...", flush=True)
            status[step.name] = run(step, arguments, min(limit_s, left), site)
        print(f"{step.name}: {status[step.name]}", flush=True)
    text = summary(arguments.out, status)
    (arguments.out / "summary.md").write_text(text)
    print(text)
    return int(any(what.startswith(("failed", "stopped", "out of time")) for what in status.values()))


if __name__ == "__main__":
    raise SystemExit(main())
