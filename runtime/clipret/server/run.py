"""The service as a process: open galleries, start threads, run uvicorn until it is stopped."""

import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery
from clipret.hardware.cpu import cpu_count
from clipret.inference.encoder import Encoder
from clipret.logs import is_configured
from clipret.milvus.collection import Address
from clipret.server.app import Service, create_app
from clipret.server.limits import Limits
from clipret.server.metrics import Metrics
from clipret.server.protocol import protocol
from clipret.server.service import ServedGallery, Threads
from clipret.server.snapshot import SearchSettings

__all__ = ["listen", "make_server", "open_service", "serve"]

_BACKLOG = 2048
_FILES = 256  # open files of the process besides its connections


@contextlib.contextmanager
def open_service(
    galleries: Sequence[tuple[Path | str, Encoder]],
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    settings: SearchSettings | None = None,
) -> Iterator[Service]:
    """Open galleries and start the threads of a service.

    Args:
        galleries: Pairs of a gallery's path and the encoder of its bundle. A gallery is served under the name of its
            folder, or of the collection of milvus+URI, with a number appended if the name is already used.
        limits: Limits of requests and of the service.
        token: The token that changes to galleries require; None turns changes off.
        hosts: See `ServiceMiddleware`.
        settings: The settings of every search.

    Yields:
        The service.

    Raises:
        ClipretError: A gallery or its model cannot be opened.
    """
    limits = limits or Limits()
    metrics = Metrics()
    with contextlib.ExitStack() as stack:

        def pool(threads: int, name: str) -> ThreadPoolExecutor:
            return stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix=name))

        decoders = max(2, cpu_count())
        threads = Threads(pool(1, "compute"), pool(decoders, "images"), pool(4, "filters"), pool(1, "files"))
        opened = dict[str, ServedGallery]()
        for path, encoder in galleries:
            folder = path if isinstance(path, str) else Gallery.open(path).path
            base = Address.parse(folder).name if isinstance(folder, str) else folder.name
            names = (base if number == 1 else f"{base}-{number}" for number in range(1, 1 << 30))
            name = next(name for name in names if name not in opened)

            def on_batch(size: int, name: str = name) -> None:
                metrics.batch(name, size)

            opened[name] = ServedGallery(name, folder, encoder, limits, threads, settings or SearchSettings(), on_batch)
            opened[name].load()
        yield Service(opened, threads, limits, metrics, token, hosts)


def serve(service: Service, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve at http://HOST:PORT/ until SIGINT or SIGTERM, then finish the running requests.

    Args:
        service: From `open_service`.
        host: Address to listen on.
        port: Port; 0 chooses a free one.
        started: Called with the URL of the service.

    Raises:
        ClipretError: The address cannot be used.
    """
    listening = listen(host, port)
    _allow_files(service.limits.connections + _FILES)
    # uvicorn raises the signal again when it has finished, which must exit Python, not kill it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    name = f"[{host}]" if ":" in host else host
    with listening, contextlib.suppress(KeyboardInterrupt):
        started(f"http://{name}:{listening.getsockname()[1]}/")
        make_server(service).run([listening])


def make_server(service: Service) -> uvicorn.Server:
    """A server for listening sockets. `run` returns once `should_exit` is set and no request is running."""
    config = uvicorn.Config(
        create_app(service),
        http=protocol(service.limits),
        ws="none",
        lifespan="on",
        # If `clipret.logs` is configured, it handles uvicorn's messages too; otherwise uvicorn writes faults to stderr.
        **({"log_config": None} if is_configured() else {"log_level": "warning"}),
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(service.limits.seconds) + 1,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ClipretError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClipretError(f"cannot listen on {host} port {port}: {reason}; choose another --port") from error
    # Connections inherit it. asyncio does not set it on sockets from create_server. Without it the body of a response
    # waits 40 ms until the client acknowledges the header (Nagle's algorithm).
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _allow_files(count: int) -> None:
    """Raise the limit of open files to `count`, as far as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
