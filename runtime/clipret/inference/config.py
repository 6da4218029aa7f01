"""How an encoder works: its settings as one object, from the command line to the worker of a cluster."""

from dataclasses import dataclass
from typing import Literal

from clipret.backends import BackendChoice
from clipret.errors import ClipretError
from clipret.hardware.cpu import cpu_count

__all__ = ["EncoderConfig"]


@dataclass(frozen=True)
class EncoderConfig:
    """The settings of an `Encoder`, all of them.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:N", or several with commas between them, which share the images of one
            stream.
        backend: What runs the towers, see `open_tower`.
        threads: Decode threads and threads of the backend; None: the processors there are.
        batch_size: Images or texts that a tower is given at once, at most.
        fast_decode: See `images.load`.
        decode: "gpu" has JPEGs decoded by nvImageCodec, see `GpuDecoder`.
        cuda_graphs: See `OnnxTower`.
        image_timeout: Seconds after which an image is skipped.

    Raises:
        ClipretError: A value is out of its range, or two settings exclude each other.
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
            raise ClipretError("a JPEG is decoded either fast by Pillow or by nvImageCodec: leave one of the two out")

    @property
    def thread_count(self) -> int:
        """The threads that are meant."""
        return self.threads or cpu_count()
