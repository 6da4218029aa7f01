"""Tell local paths, URIs of object stores and Milvus collections apart."""

import re
from pathlib import Path

__all__ = ["is_milvus", "is_remote", "remote_in"]

_SCHEMES = "s3|gs|gcs|hdfs|viewfs|abfs|abfss"  # http:// is not supported and stays an unreadable local name
_URI = re.compile(rf"({_SCHEMES})://(.+)", re.DOTALL)
_IN_PATH = re.compile(rf"(?:^|/)({_SCHEMES}):/([^/].*)", re.DOTALL)


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URI such as s3://bucket/key and not a local path."""
    return isinstance(name, str) and _URI.match(name) is not None


def remote_in(path: str | Path) -> str | None:
    """Find the URI in a path that was joined to a folder and lost a slash: /root/s3:/bucket/key.

    Returns:
        The URI, or None if the path is local.

    Examples:
        >>> remote_in("/root/s3:/bucket/key")
        's3://bucket/key'
    """
    text = str(path)
    if is_remote(text):
        return text
    match = _IN_PATH.search(text)
    return f"{match[1]}://{match[2]}" if match else None


def is_milvus(name: str | Path) -> bool:
    """Whether a name is that of a Milvus collection: milvus+URI."""
    return isinstance(name, str) and name.startswith("milvus+")
