"""What a name stands for: a path of this machine, an address in a store, a collection of Milvus."""

import re
from pathlib import Path

__all__ = ["is_milvus", "is_remote", "remote_in"]

_SCHEMES = "s3|gs|gcs|hdfs|viewfs|abfs|abfss"  # what a web server has is no file: http:// stays an unreadable name
_URI = re.compile(rf"({_SCHEMES})://(.+)", re.DOTALL)
_IN_PATH = re.compile(rf"(?:^|/)({_SCHEMES}):/([^/].*)", re.DOTALL)


def is_remote(name: str | Path) -> bool:
    """Whether a name is an address such as s3://bucket/key, and no path of this machine."""
    return isinstance(name, str) and _URI.match(name) is not None


def remote_in(path: str | Path) -> str | None:
    """The address in a path that was joined to a folder and lost a slash on the way: /root/s3:/bucket/key."""
    text = str(path)
    if is_remote(text):
        return text
    found = _IN_PATH.search(text)
    return f"{found[1]}://{found[2]}" if found else None


def is_milvus(name: str | Path) -> bool:
    """Whether a name stands for a collection: milvus+URI."""
    return isinstance(name, str) and name.startswith("milvus+")
