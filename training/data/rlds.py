"""RLDS/TFDS datasets without TensorFlow: TFRecord shards, one tf.train.Example an episode, keys `steps/...`.

Bridge V2 (actions in one vector), and the Open X-Embodiment layouts of Fractal, Kuka and Bridge (actions in
parts) are known; other datasets say `action_key`, `state_key` and `rate_hz`.
"""

import json
import re
import struct
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tfrecord import example_pb2
from tfrecord.writer import TFRecordWriter

from config.dataset import DatasetConfig
from training.data.episode import DataError, Episode, decode_picture, finite, uniform_times
from training.data.videos import fingerprint, stack

# frames per second by dataset name: RT-1 (Brohan et al. 2022) 3, Bridge (Walke et al. 2023) 5, QT-Opt 10
RATES_HZ = {
    "fractal20220817_data": 3.0,
    "bridge": 5.0,
    "bridge_dataset": 5.0,
    "bridge_orig": 5.0,
    "kuka": 10.0,
}
_PARTS = "action/world_vector,action/rotation_delta,"
ACTIONS = ("action", f"{_PARTS}action/gripper_closedness_action", f"{_PARTS}action/open_gripper")
STATES = (
    "observation/state",
    "observation/base_pose_tool_reached,observation/gripper_closed",
    "observation/clip_function_input/base_pose_tool_reached,observation/gripper_closed",
)
INSTRUCTIONS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "natural_language_instruction",
)


class RldsReader:
    """Views are the picture features under `steps/observation`; one that is a flat colour is not a view of an
    episode.
    """

    action_names = None

    def __init__(self, path: Path, config: DatasetConfig):
        self.broken: list[tuple[str, str]] = []
        shards = sorted(path.rglob(f"*-{config.split}.tfrecord*")) or sorted(path.rglob("*.tfrecord*"))
        if not shards:
            raise DataError(f"{path}: no *-{config.split}.tfrecord-* file; set `split` or `path`")
        folder = shards[0].parent
        self._features = _features(folder / "features.json")
        self._shapes = {name: tuple(f[1]) for name, f in self._features.items()}
        pictures = [
            n for n, (kind, _) in self._features.items() if kind == "image" and n.startswith("observation/")
        ]
        self.views = tuple(sorted(n.removeprefix("observation/") for n in pictures))
        self._rate = config.rate_hz or RATES_HZ.get(_name(folder))
        if self._rate is None:
            raise DataError(f"{folder}: the rate of {_name(folder)!r} is not in its files: set rate_hz")
        self._action = self._vector(config.action_key, ACTIONS)
        self._state = self._vector(config.state_key, STATES)
        self._text = next((n for n in INSTRUCTIONS if n in self._features), None)
        self._records = [(shard, *place) for shard in shards for place in self._index(shard)]
        self._records = self._records[: config.max_episodes]

    def _vector(self, asked: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
        if asked is not None:
            names = tuple(asked.removeprefix("steps/").split(","))
            if unknown := [n for n in names if n not in self._features]:
                raise DataError(
                    f"no feature {unknown} among the steps; there are {', '.join(sorted(self._features))}"
                )
            return names
        for names in (tuple(candidate.split(",")) for candidate in usual):
            if all(n in self._features for n in names):
                return names
        return ()

    def _index(self, shard: Path) -> list[tuple[int, int]]:
        """(offset, bytes) of each record; a shard that ends early gives those before."""
        places, size = [], shard.stat().st_size
        with open(shard, "rb") as file:
            at = 0
            while at < size:
                file.seek(at)
                head = file.read(12)
                if len(head) < 12 or TFRecordWriter.masked_crc(head[:8]) != head[8:]:
                    self.broken.append(
                        (str(shard), f"record {len(places)}: bad length at byte {at}; the rest is lost")
                    )
                    break
                length = struct.unpack("<Q", head[:8])[0]
                if at + length + 16 > size:
                    self.broken.append((str(shard), f"record {len(places)}: the file ends inside it"))
                    break
                places.append((at + 12, length))
                at += length + 16
        return places

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        shard, offset, _ = self._records[index]
        return f"{shard.name}@{offset}"

    def length(self, index: int) -> int:
        return self._length(self._read(index), self.key(index))

    def episode(self, index: int) -> Episode:
        key, steps = self.key(index), self._read(index)
        count = self._length(steps, key)

        def pictures(view: str) -> list[bytes]:
            data = steps[f"observation/{view}"].bytes_list.value
            if len(data) != count:
                raise DataError(f"{key}: {len(data)} pictures of {view}, {count} steps")
            return data

        def decode(view: str, indices: np.ndarray) -> np.ndarray:
            data = pictures(view)
            return stack([decode_picture(data[i], f"{key} {view} {i}") for i in indices], key)

        def flat(view: str) -> bool:
            data = pictures(view)
            return (
                data[0] == data[-1]
                and not np.ptp(decode_picture(data[0], f"{key} {view} 0"), axis=(0, 1)).any()
            )

        text = steps[self._text].bytes_list.value if self._text in steps else ()
        return Episode(
            key=key,
            timestamps=uniform_times(count, self._rate),
            views=tuple(v for v in self.views if f"observation/{v}" in steps and not flat(v)),
            instruction=text[0].decode("utf-8", "replace").strip() if text else "",
            decode=decode,
            actions=finite(self._matrix(steps, self._action, count, key), key, "action"),
            state=finite(self._matrix(steps, self._state, count, key), key, "state"),
        )

    def fingerprint(self) -> str:
        return fingerprint(dict.fromkeys(shard for shard, _, _ in self._records))

    def _read(self, index: int) -> dict[str, example_pb2.Feature]:
        """Features of the steps by name. Raises DataError for a wrong checksum."""
        shard, offset, length = self._records[index]
        key = self.key(index)
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                data, crc = file.read(length), file.read(4)
        except OSError as error:
            raise DataError(f"{key}: {error}") from error
        if TFRecordWriter.masked_crc(data) != crc:
            raise DataError(f"{key}: checksum differs: the file is damaged, download it again")
        example = example_pb2.Example()
        try:
            example.ParseFromString(data)
        except DecodeError as error:
            raise DataError(f"{key}: not a tf.train.Example: {error}") from error
        return {
            name.removeprefix("steps/"): feature
            for name, feature in example.features.feature.items()
            if name.startswith("steps/")
        }

    def _length(self, steps: dict[str, example_pb2.Feature], key: str) -> int:
        for name in ("is_first", "is_last", *(f"observation/{v}" for v in self.views)):
            if name in steps:
                count = len(_values(steps[name]))
                if count == 0:
                    raise DataError(f"{key}: has no steps")
                return count
        raise DataError(f"{key}: no steps/is_first and no picture tells how long it is")

    def _matrix(self, steps: dict, names: tuple[str, ...], count: int, key: str) -> np.ndarray | None:
        columns = []
        for name in names:
            if name not in steps:
                raise DataError(f"{key}: lacks {name}")
            try:
                values = np.asarray(_values(steps[name]), np.float32)
            except ValueError as error:
                raise DataError(f"{key}: {name} is not numbers: {error}") from error
            width = int(np.prod(self._shapes[name], dtype=int))
            if values.size != count * width:
                raise DataError(
                    f"{key}: {name} has {values.size} values, {count} steps of {width} need {count * width}"
                )
            columns.append(values.reshape(count, width))
        return np.concatenate(columns, -1) if columns else None


def _values(feature: example_pb2.Feature):
    kind = feature.WhichOneof("kind")
    return getattr(feature, kind).value if kind else ()


def _name(folder: Path) -> str:
    """The dataset's name from dataset_info.json, else from its folder (<name>/<version>)."""
    info = folder / "dataset_info.json"
    if info.is_file():
        try:
            return json.loads(info.read_text()).get("name", "")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{info}: not a TFDS description, download it again: {error!r}") from error
    return folder.parent.name if re.fullmatch(r"[\d.]+", folder.name) else folder.name


def _features(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Step features of a features.json: name -> (image | text | tensor, shape)."""
    if not path.is_file():
        raise DataError(f"{path} is missing: it describes the shards; download it from the dataset's folder")
    try:
        tree = json.loads(path.read_text())
        return dict(_leaves(tree["featuresDict"]["features"]["steps"]["sequence"]["feature"], ""))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the features of an RLDS dataset: {error!r}") from error


def _leaves(node: dict, name: str):
    if "featuresDict" in node:
        for key, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{name}/{key}" if name else key)
        return
    kind = next((k for k in ("image", "text") if k in node), "tensor")
    shape = node.get(kind, {}).get("shape", {}).get("dimensions", [])
    yield name, (kind, [int(n) for n in shape])
