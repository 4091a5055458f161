"""Which recorded episodes a training run reads, in what proportion, and how their frames are augmented."""

from typing import ClassVar, Literal

from pydantic import Field

from config.embodiment import Crop
from config.loading import Strict

Kind = Literal["auto", "ssv2", "rlds", "lerobot", "libero", "folder"]


class DatasetConfig(Strict):
    """One dataset on disk. What a field leaves empty is taken from the dataset's own files."""

    kind: Kind = Field(
        "auto",
        description="auto: told from the files; ssv2: labels/*.json and <id>.webm; rlds: TFRecord shards; "
        "lerobot: LeRobotDataset v3.0; libero: HDF5 files; folder: videos, or folders of frames",
    )
    path: str = Field(description="the dataset's folder")
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the other datasets")
    split: str = Field("train", description="ssv2: train, validation or trainval; rlds: the split's name")
    views: tuple[str, ...] = Field((), description="cameras to use, by name; empty: all")
    rate_hz: float | None = Field(None, gt=0, le=1000, description="frames per second, where no file says it")
    crop: Crop | None = Field(
        None, description="part of every picture to use; null: all of it, in stage 3 the embodiment's"
    )
    stride: int = Field(1, ge=1, description="use every n-th frame (official: 2 for ssv2)")
    action_key: str | None = Field(None, description="field with the actions [T, D]")
    state_key: str | None = Field(None, description="field with the robot's state [T, D]")
    min_frames: int = Field(2, ge=2, description="shorter episodes are skipped and counted")
    max_episodes: int | None = Field(None, ge=1, description="use the first n episodes only")
    instructed_only: bool = Field(False, description="skip and count episodes without an instruction")


class Augmentation(Strict):
    """Random picture changes, drawn once a sample for all its frames. Defaults: official finetuning.

    Hue in OpenCV's units (180 a turn), saturation and value of 255.
    """

    crop_area: tuple[float, float] = Field((0.9, 0.9), description="range of the kept share of the area")
    crop_ratio: tuple[float, float] = Field(
        (1.0, 1.0), description="range of the crop's relative width/height"
    )
    brightness: float = Field(0.2, ge=0, le=1)
    contrast: float = Field(0.2, ge=0, le=1)
    hue: float = Field(5, ge=0, le=90)
    saturation: float = Field(20, ge=0, le=255)
    value: float = Field(20, ge=0, le=255)


class Mixture(Strict):
    """Datasets that are sampled together, and the episodes held out of training."""

    KIND: ClassVar[str] = "datasets"

    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    validation_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each dataset's episodes held out, chosen by a hash of their names",
    )
    on_error: Literal["skip", "raise"] = Field(
        "skip", description="skip: an unreadable episode is counted and replaced; raise: it ends the run"
    )

    def seen_through(self, crop: Crop | None, camera: str | None = None) -> "Mixture":
        """With `crop` and the view `camera` for every dataset that names none of its own."""
        views = (camera,) if camera else ()
        datasets = tuple(
            d.model_copy(update={"crop": d.crop or crop, "views": d.views or views}) for d in self.datasets
        )
        return self.model_copy(update={"datasets": datasets})
