"""Small datasets in every format, whose pictures tell which episode and frame they are."""

import json
import struct
from pathlib import Path

import av
import cv2
import h5py
import numpy as np
from tfrecord import example_pb2
from tfrecord.writer import TFRecordWriter

from config.embodiment import Embodiment
from episodes import layout
from episodes.writer import Writer

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
STEPS = 10
ROBOT = Embodiment(
    name="bridge",
    horizon=4,
    rate_hz=5,
    history_seconds=0.2,
    dimensions=[{"name": f"x{i}", "kind": "joint"} for i in range(6)] + [{"name": "g", "kind": "gripper"}],
)


def picture(episode: int, index: int, height: int = 32, width: int = 40) -> np.ndarray:
    """uint8 RGB: red tells the episode, the left edge of the white lower bar the frame (2 px a frame)."""
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[..., 0] = 25 * episode % 256
    rgb[height // 2 :, 2 * index : 2 * index + 4] = 255
    return rgb


def index_of(rgb: np.ndarray) -> int:
    """The frame that `picture` drew, at any size: from the middle of the bar."""
    row = rgb[3 * len(rgb) // 4, :, 1].astype(float)
    row *= row > 60
    middle = (row * (np.arange(len(row)) + 0.5)).sum() / row.sum()
    return round(middle / len(row) * 20 - 1)


def episode_of(rgb: np.ndarray) -> int:
    return round(float(np.median(rgb[: len(rgb) // 4, :, 0])) / 25)


def actions(episode: int, steps: int = STEPS) -> np.ndarray:
    values = np.linspace(-0.05, 0.05, steps * 7).reshape(steps, 7).astype(np.float32) * (1 + episode)
    values[:, 6] = np.arange(steps) % 2
    return values


# --- RLDS ---------------------------------------------------------------------------------------------------


def _feature(values) -> example_pb2.Feature:
    feature = example_pb2.Feature()
    if isinstance(values[0], bytes):
        feature.bytes_list.value.extend(values)
    elif isinstance(values[0], (int, np.integer)):
        feature.int64_list.value.extend(int(v) for v in values)
    else:
        feature.float_list.value.extend(float(v) for v in values)
    return feature


def tfrecord(path: Path, episodes: list[dict[str, list]]) -> None:
    with open(path, "wb") as file:
        for episode in episodes:
            example = example_pb2.Example()
            for name, values in episode.items():
                example.features.feature[name].CopyFrom(_feature(values))
            data = example.SerializeToString()
            head = struct.pack("<Q", len(data))
            for part in (head, TFRecordWriter.masked_crc(head), data, TFRecordWriter.masked_crc(data)):
                file.write(part)


def _tensor(*shape: int) -> dict:
    return {"tensor": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": "float32"}}


def _features(tree: dict) -> dict:
    return {"featuresDict": {"features": tree}}


def rlds(folder: Path, name: str, steps: dict[str, dict], episodes: list[dict[str, list]]) -> Path:
    """A TFDS folder: `steps` are the features of a step as a nested dict, leaves as in features.json."""
    folder.mkdir(parents=True)
    tree = {"steps": {"sequence": {"feature": _features(steps)}}}
    (folder / "features.json").write_text(json.dumps(_features(tree)))
    (folder / "dataset_info.json").write_text(json.dumps({"name": name}))
    tfrecord(folder / f"{name}-train.tfrecord-00000-of-00001", episodes)
    return folder


def _jpeg(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()


IMAGE = {"image": {"shape": {"dimensions": ["32", "40", "3"]}, "encodingFormat": "jpeg"}}


def bridge(folder: Path, episodes: int = 4, instruction: str = "put the carrot on the plate") -> Path:
    """As the Bridge V2 sample: several views, one of them black, 7-D actions, one instruction a step."""
    steps = {
        "action": _tensor(7),
        "is_first": _tensor(),
        "language_instruction": {"text": {}},
        "observation": _features({"image_0": IMAGE, "image_1": IMAGE, "image_2": IMAGE, "state": _tensor(7)}),
    }
    rows = []
    for number in range(episodes):
        frames = [picture(number, k) for k in range(STEPS)]
        rows.append(
            {
                "steps/is_first": [int(k == 0) for k in range(STEPS)],
                "steps/action": actions(number).ravel().tolist(),
                "steps/language_instruction": [instruction.encode()] * STEPS,
                "steps/observation/image_0": [_jpeg(f) for f in frames],
                "steps/observation/image_1": [_jpeg(f[:, ::-1]) for f in frames],
                "steps/observation/image_2": [_jpeg(np.zeros_like(f)) for f in frames],
                "steps/observation/state": np.full(7 * STEPS, float(number)).tolist(),
            }
        )
    return rlds(folder, "bridge_dataset", steps, rows)


def open_x(folder: Path, name: str) -> Path:
    """The Open X-Embodiment layout of Fractal and Kuka: actions in parts, instruction under observation."""
    pose = "clip_function_input/base_pose_tool_reached" if name == "kuka" else "base_pose_tool_reached"
    observation = {"image": IMAGE, "natural_language_instruction": {"text": {}}, "gripper_closed": _tensor(1)}
    if name == "kuka":
        observation["clip_function_input"] = _features({"base_pose_tool_reached": _tensor(7)})
    else:
        observation["base_pose_tool_reached"] = _tensor(7)
    parts = {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1, "terminate_episode": 3}
    steps = {
        "action": _features({key: _tensor(width) for key, width in parts.items()}),
        "is_first": _tensor(),
        "observation": _features(observation),
    }
    values = actions(0)
    row = {
        "steps/is_first": [1, *[0] * (STEPS - 1)],
        "steps/action/world_vector": values[:, :3].ravel().tolist(),
        "steps/action/rotation_delta": values[:, 3:6].ravel().tolist(),
        "steps/action/gripper_closedness_action": values[:, 6].tolist(),
        "steps/action/terminate_episode": [0] * (3 * STEPS),
        "steps/observation/image": [_jpeg(picture(0, k)) for k in range(STEPS)],
        "steps/observation/natural_language_instruction": [b"pick coke can"] * STEPS,
        f"steps/observation/{pose}": np.arange(7 * STEPS, dtype=float).tolist(),
        "steps/observation/gripper_closed": values[:, 6].tolist(),
    }
    return rlds(folder, name, steps, [row])


# --- the others ---------------------------------------------------------------------------------------------


def video(path: Path, episode: int, frames: int, rate: int = 12, codec: str = "libvpx") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 80, 64, "yuv420p", 2_000_000
        for index in range(frames):
            rgb = cv2.resize(picture(episode, index), (80, 64), interpolation=cv2.INTER_NEAREST)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def pictures(folder: Path, episode: int, frames: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(frames):
        cv2.imwrite(str(folder / f"{index}.png"), picture(episode, index)[..., ::-1])
    return folder


def something(folder: Path, labels: list[str], frames: int = 14) -> Path:
    (folder / "labels").mkdir(parents=True)
    entries = [{"id": str(100 + n), "label": label, "template": label} for n, label in enumerate(labels)]
    (folder / "labels/train.json").write_text(json.dumps(entries, ensure_ascii=False))
    for n in range(len(labels)):
        video(folder / f"20bn-something-something-v2/{100 + n}.webm", n, frames)
    return folder


def libero(folder: Path, demos: int = 2) -> Path:
    folder.mkdir(parents=True)
    with h5py.File(folder / "KITCHEN_SCENE1_put_the_bowl_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the plate"})
        for number in range(demos):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = actions(number).astype(np.float64)
            frames = np.stack([picture(number, k) for k in range(STEPS)])
            demo["obs/agentview_rgb"] = frames[:, ::-1]  # stored bottom row first
            demo["obs/joint_states"] = np.zeros((STEPS, 7))
            demo["obs/gripper_states"] = np.full((STEPS, 2), 0.04)
    return folder


def lerobot(
    folder: Path, episodes: int = 3, frames: int = 20, names: tuple[str, ...] = tuple("abcdefg")
) -> Path:
    vector = layout.vector(names)
    features = {
        "observation.images.front": layout.camera(32, 40),
        "observation.state": vector,
        "action": vector,
    }
    with Writer.create(folder, 15, features, crf=10) as writer:
        for number in range(episodes):
            for k in range(frames):
                writer.add(
                    {
                        "observation.images.front": picture(number, k % 18),
                        "observation.state": np.full(len(names), number),
                        "action": np.full(len(names), number + k / 100),
                    },
                    f"task {number}",
                )
            writer.save()
    return folder
