"""The settings of an encoder as one object, from the command line to the workers of a cluster."""

from dataclasses import dataclass
from typing import Literal

from clipret.backends import BackendChoice
from clipret.errors import ClipretError
from clipret.hardware.cpu import cpu_count

__all__ = ["EncoderConfig"]


@dataclass(frozen=True)
class EncoderConfig:
    """The settings of an `Encoder`.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N", or several separated by commas, which share the images of a stream.
        backend: What runs the towers, see `open_tower`.
        threads: Number of decode threads and of threads of the backend; None: one per processor.
        batch_size: Maximum number of images or texts per run of a tower.
        fast_decode: Decode large JPEGs faster and less exactly, see `images.load`.
        decode: "pillow", or "gpu" to decode JPEGs with nvImageCodec, see `GpuDecoder`.
        cuda_graphs: Record CUDA graphs, see `OnnxTower`.
        image_timeout: Seconds after which an image is skipped.

    Raises:
        ClipretError: A value is out of range, or two settings exclude each other.

    Examples:
        >>> EncoderConfig(threads=4).thread_count
        4
    """

    device: str = "auto"
    backend: BackendChoice = "auto"
    threads: int | None = None
    batch_size: int = 32
    fast_decode: bool = False
    decode: Literal["pillow", "gpu"] = "pillow"
    cuda_graphs: bool = False
    image_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, least, most in (("threads", 1, 1024), ("batch_size", 1, 65536), ("image_timeout", 0.1, 86400)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ClipretError(f"{name} is {value}: use a number from {least} to {most}")
        if self.fast_decode and self.decode == "gpu":
            raise ClipretError("fast_decode is Pillow's and decode=gpu uses nvImageCodec: use either one or the other")

    @property
    def thread_count(self) -> int:
        """The number of threads, with the default resolved."""
        return self.threads or cpu_count()
