"""What a policy server serves."""

from typing import ClassVar, Literal

from pydantic import Field

from config.loading import Strict


class Policy(Strict):
    """A checkpoint and how to run it."""

    KIND: ClassVar[str] = "policies"

    checkpoint: str = Field(
        description="checkpoint folder; relative paths start at the checkout or share folder"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on cuda, float32 on cpu"
    )
    image_encoder: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the VQGAN, cuda only; auto: dtype. bfloat16 changes 2-3 % of the image tokens"
    )
    quantization: Literal["none", "fp8"] = Field(
        "none", description="fp8: half the memory and faster; Hopper or later GPU (cpu: emulated, slow)"
    )
    cuda_graphs: bool = Field(True, description="record the computation once and replay it (cuda only)")
    max_batch: int = Field(4, ge=1, le=16, description="robots answered in one forward pass")
    sampler: Literal["euler", "heun"] = "euler"
    steps: int = Field(10, ge=1, le=100, description="integration steps (ViPRA section 4.3: 10)")
    noise_scale: float = Field(
        1.0,
        ge=0,
        le=1,
        description="of the noise a chunk begins as (ViPRA-FM); below 1: nearer the mean of what was shown, "
        "0: the same chunk whatever the seed",
    )
    threads: int | None = Field(None, ge=1, description="torch CPU threads; null: torch's choice")
