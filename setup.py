"""Installs vipra_ros with pip (everything, by extras) and with colcon (as a ROS 2 package)."""

from collections import defaultdict
from pathlib import Path

from setuptools import find_packages, setup

NAME = "vipra_ros"

# Lower bounds are the versions this release was tested with.
BASE = [
    "msgpack>=1.2",
    "numpy>=2.4",
    "pydantic>=2.14",
    "pyyaml>=6.0",
    "pyzmq>=27.3",
    "rich>=15.0",
    "typer>=0.29",
]
EXTRAS = {
    # The robot PC: ROS 2 Kilted wheels, Franka control, kinematics and collision checks, cameras, reports.
    "robot": [
        "av>=18.1",
        "coal>=3.0",
        "dynamixel-sdk>=3.8",  # GELLO on a serial port
        "franky-control>=2.0",
        "franky-sim>=1.0.4",  # its FR3 description and meshes feed kinematics and collision checks
        "matplotlib>=3.11",
        "opencv-python>=5.0",
        "pandas>=3.0",
        "pillow>=13.0",
        "pin>=4.1",
        "pyarrow>=26.0",
        "ros-ament-index-python>=1.11",
        "ros-builtin-interfaces>=2.3",
        "ros-diagnostic-msgs>=5.5",
        "ros-geometry-msgs>=5.5",
        "ros-rcl-interfaces>=2.3",
        "ros-rclpy[fastrtps]>=9.1",
        "ros-rosgraph-msgs>=2.3",
        "ros-sensor-msgs>=5.5",
        "ros-std-msgs>=5.5",
        "ros-std-srvs>=5.5",
        "ros-trajectory-msgs>=5.5",
        "ruckig>=0.19",
    ],
    # The GPU box: no ROS.
    "server": [
        "opencv-python>=5.0",
        "safetensors>=0.8",
        "tokenizers>=0.23",
        "torch>=2.15",
    ],
    # The simulated workcell: no torch.
    "sim": [
        "fast_simplification>=0.2",
        "franky-sim>=1.0.4",
        "mink>=1.3",
        "mujoco>=4.0",
    ],
    # Offline training; its simulated demonstrations also need "sim".
    "train": [
        "av>=18.1",
        "h5py>=3.16",
        "lpips>=0.1.4",
        "matplotlib>=3.11",
        "opencv-python>=5.0",
        "pandas>=3.0",
        "peft>=0.21",
        "pillow>=13.0",
        "pyarrow>=26.0",
        "safetensors>=0.8",
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "tensorboard>=2.21",
        "tfrecord>=1.14",
        "tokenizers>=0.23",
        "torch>=2.15",
        "torchvision>=0.29",
        "transformers>=5.23",
    ],
    # What the recorder writes with raw:=true.
    "raw": ["mcap>=1.6"],
    "test": [
        "colcon-common-extensions>=0.3",
        "hypothesis>=6.170",
        "import-linter>=2.16",
        "mcap-ros2-support>=0.6",
        "pytest>=9.2",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "transformers>=5.23",  # the backbone is compared with its LlamaForCausalLM
        "setuptools>=64,<80",  # colcon calls setup.py, and later versions dropped what it needs
    ],
}
NODES = ("camera", "arms", "policy", "teleop", "recorder", "evaluation")


def share_files():
    """(folder under the prefix, files) of everything that is found under share/vipra_ros once installed."""
    folders = defaultdict(list)
    for pattern in ("config/**/*.yaml", "launch/*.launch.py", "checkpoints/**/*"):
        for path in sorted(Path(".").glob(pattern)):
            if path.is_file():
                folders[f"share/{NAME}/{path.parent}"].append(str(path))
    return [
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *folders.items(),
    ]


setup(
    name=NAME,
    version="0.1.0",
    description="ViPRA video-prediction policies on Franka arms: policy server, ROS 2 nodes, simulation",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    maintainer="vipra_ros maintainers",
    maintainer_email="maintainers@vipra-ros.org",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{suffix}"
            for name in (
                "config",
                "episodes",
                "models",
                "policy_server",
                "simulation",
                "training",
                "vipra_ros",
            )
            for suffix in ("", ".*")
        ]
    ),
    data_files=share_files(),
    install_requires=BASE,
    extras_require=EXTRAS,
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "vipra = vipra_ros.cli:main",
            *(f"vipra_{node} = vipra_ros.nodes.{node}:main" for node in NODES),
            "vipra_policy_server = policy_server.server:main",
            "vipra_simulator = simulation.server:main",
        ]
    },
)
