"""The README's journey from demonstrations to a report, command by command, at the smallest size."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from episodes.reader import Dataset

ROOT = Path(__file__).parents[2]
SIZES = {  # beginning of a command -> what makes it small
    "vipra dataset generate": "--seconds 1.1 --workers 1",
    "vipra dataset view": "--columns 2",
    "vipra train finetune": "--set steps=2 --set global_batch=2 --set micro_batch=2 --set samples=1 "
    "--set validation.samples=2",
    "vipra evaluate": "--time-limit 0.5 --no-video",
}


def journey() -> list[str]:
    """The commands of the README's block, one a string."""
    section = (ROOT / "README.md").read_text().partition("### From demonstrations to a report\n")[2]
    block = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    return block.replace("\\\n", " ").splitlines()


@pytest.mark.timeout(900)
def test_the_journey_of_the_readme_ends_in_a_report(tmp_path):
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    commands = journey()
    assert [c for c in SIZES if not any(command.startswith(c) for command in commands)] == []
    said = ""
    for command in commands:
        words = shlex.split(command)
        more = next((size for start, size in SIZES.items() if command.startswith(start)), "")
        program = {"vipra": [sys.executable, "-P", "-m", "vipra_ros.cli"], "python": [sys.executable]}[
            words[0]
        ]
        argv = [*program, *words[1:], *shlex.split(more)]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        said = done.stdout
    report = json.loads(said)  # the last command shows it
    assert [trial["seed"] for trial in report["trials"]] == [0, 1, 2]
    assert 0 <= report["success_rate"] <= report["partial_rate"] <= 1 and len(report["interval95"]) == 2
    dataset = Dataset(tmp_path / "recordings" / "first")
    assert len(dataset) == 5 and {row.length for row in dataset.rows} == {17}
    assert (tmp_path / "recordings" / "first.png").stat().st_size > 10_000
