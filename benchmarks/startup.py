"""From a checkpoint folder to a warm engine: seconds, host memory, device memory, in a fresh process.

    python -m benchmarks.startup --model tiny|100m|7b [--folder DIR] [--json FILE]

Writes random weights to DIR (7b: 13.5 GB) unless a checkpoint is there, then loads it as `vipra serve` does,
without and with fp8. `read` is what reading the same files costs alone; both come from the page cache when
the files were just written. The load includes comparing every file with its SHA-256.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from config.policy import Policy as PolicyConfig
from models import checkpoint as checkpoints
from models import fp8
from policy_server.engine import Engine

TITLES = {
    "quantization": "quantization",
    "checkpoint_gib": "checkpoint GiB",
    "read_s": "read s",
    "load_s": "load s",
    "warm_s": "warm-up s",
    "host_gib": "host peak GiB",
    "weights_gib": "weights GiB",
    "cache_gib": "cache GiB",
    "graphs_gib": "graphs GiB",
    "device_gib": "device peak GiB",
}


def write(model: str, folder: Path, where: torch.device) -> None:
    """A checkpoint of random weights, in bf16 for 7b as released, else in fp32; nothing when one is there."""
    if (folder / "manifest.json").exists():
        return
    config = common.sized(model, 8)
    parts = common.parts(config)
    dtype = torch.bfloat16 if model == "7b" else torch.float32
    checkpoints.init_checkpoint(config, folder, *parts, device=where, dtype=dtype)


def load(folder: Path, device: str, quantization: str) -> dict:
    """One row, in this process: nothing may have touched the device or the files' tensors before."""
    files = sorted(folder.glob("*.safetensors"))
    begin, buffer = time.perf_counter(), bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read = time.perf_counter()
    policy = PolicyConfig(checkpoint=str(folder), device=device, max_batch=1, quantization=quantization)
    engine = Engine.from_policy(policy)
    loaded = time.perf_counter()
    engine.warm_up()
    warm, memory = time.perf_counter(), engine.memory()
    cuda = device == "cuda"
    return {
        "quantization": quantization,
        "checkpoint_gib": sum(path.stat().st_size for path in files) / 2**30,
        "read_s": read - begin,
        "load_s": loaded - read,
        "warm_s": warm - loaded,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **{f"{part}_gib": memory.get(part, 0) / 2**30 for part in ("weights", "cache", "graphs")},
        "device_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("startup", __doc__)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="checkpoint; default: a temporary one")
    parser.add_argument(
        "--load", metavar="QUANTIZATION", help="load and print one row (used by this command)"
    )
    arguments = parser.parse_args(argv)
    where = common.device(arguments.device, arguments.threads)
    if arguments.load:
        print(json.dumps(load(arguments.folder, where.type, arguments.load)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "checkpoint"
        write(arguments.model, folder, where)
        rows = []
        for quantization in ("none", "fp8") if fp8.supported(where) else ("none",):
            command = [
                sys.executable,
                "-m",
                "benchmarks.startup",
                "--folder",
                str(folder),
                "--load",
                quantization,
            ]
            command += ["--device", where.type, "--threads", str(arguments.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    report = common.header("startup", where, model=arguments.model) | {"rows": rows}
    common.show(f"vipra_{arguments.model}: start-up, batch 1, {report['device']}", rows, TITLES)
    common.write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
