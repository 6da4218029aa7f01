"""A Milvus collection with the content of a gallery: its address, its properties, and its errors in one line.

Primary keys are the gallery's ids. Embeddings are float32, which keeps every float16; path, size, mtime_ns and hash are
fields, and the metadata are dynamic fields. The collection's properties have the model's fingerprint, the columns, and
whether an export was finished.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from clipret.errors import ClipretError, require

__all__ = ["INDEXES", "LITE_INDEXES", "RECORD", "Address", "Collection"]

RECORD = "clipret_record"  # a field: what tells whether anything but the row has changed
INDEXES = (
    *("FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "HNSW", "HNSW_SQ", "HNSW_PQ", "SCANN", "DISKANN", "AUTOINDEX"),
    *("GPU_BRUTE_FORCE", "GPU_IVF_FLAT", "GPU_IVF_PQ", "GPU_CAGRA"),
)
LITE_INDEXES = ("FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW")  # others it takes for FLAT without a word
_PREFIX = "clipret."
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_SECONDS = 30.0
_AT_ONCE = 1024  # values an expression
_BUFFER = 8192  # entities a page of an iteration


@dataclass(frozen=True)
class Address:
    """URI[#COLLECTION][?ef=64&…]: a .db file for Milvus Lite, else http://HOST:PORT; parameters after ? are for
    searches.
    """

    uri: str
    name: str = "clipret"
    search: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ClipretError."""
        uri, _, rest = text.removeprefix("milvus+").partition("#")
        name, _, options = rest.partition("?")
        if "@" in uri:
            raise ClipretError(f"{uri.partition('://')[0]}://… says who asks: put USER:PASSWORD into MILVUS_TOKEN")
        if "://" not in uri and not uri.endswith(".db"):
            raise ClipretError(f"{uri or 'nothing'} is no Milvus: give http://HOST:19530, or a file that ends in .db")
        if name and not _NAME.fullmatch(name):
            raise ClipretError(f"{name!r} cannot be a collection: letters, digits and _ alone")
        search = dict[str, int]()
        for option in filter(None, options.split("&")):
            key, _, value = option.partition("=")
            if not key.isidentifier() or not value.isdecimal():
                raise ClipretError(f"{option!r} is no option of a search: write it as ef=64 or nprobe=16")
            search[key] = int(value)
        return cls(uri, name or "clipret", search)

    @property
    def lite(self) -> bool:
        return "://" not in self.uri

    def __str__(self) -> str:
        return f"milvus+{self.uri}#{self.name}"


class Collection:
    """One collection of a server or a file. Every method raises ClipretError when Milvus refuses."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @cached_property
    def client(self) -> Any:
        if self.address.lite:
            file = Path(self.address.uri)
            if not file.absolute().parent.is_dir():
                raise ClipretError(f"{file.absolute().parent} does not exist: make it, or choose another place")
            require("milvus_lite", "milvus")
        pymilvus = require("pymilvus", "milvus")
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # what it logs it raises too
        if self.address.lite:
            for name in ("milvus_lite", "grpc._server"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        with self.told():
            return pymilvus.MilvusClient(self.address.uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=_SECONDS)

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()
            del self.__dict__["client"]

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        exceptions = require("pymilvus.exceptions", "milvus")
        try:
            yield
        except (exceptions.MilvusException, OSError) as error:
            said = " ".join(str(getattr(error, "message", error)).split())[:200]
            raise ClipretError(f"{self.address} cannot be used ({said}): {_advice(self.address, said)}") from error

    @property
    def there(self) -> bool:
        if self.address.lite and not Path(self.address.uri).exists():
            return False  # merely asking would make an empty one
        with self.told():
            return bool(self.client.has_collection(self.address.name))

    def facts(self) -> dict[str, Any]:
        """The properties that an export wrote. Raises ClipretError if there is no collection, or not one of
        clipret's."""
        if not self.there:
            raise ClipretError(f"{self.address} does not exist: clipret-search export --to milvus makes it")
        with self.told():
            held = self.client.describe_collection(self.address.name).get("properties") or {}
        found = {key.removeprefix(_PREFIX): value for key, value in held.items() if key.startswith(_PREFIX)}
        if found.get("format") != str(_FORMAT):
            said = f"has format {found['format']}" if "format" in found else "was not made by clipret"
            raise ClipretError(f"{self.address} {said}: name another collection behind #")
        with self.told():
            self.client.load_collection(self.address.name)  # a server, or a file, that was opened again has it on disk
        found["columns"] = json.loads(found["columns"])
        found["dim"] = int(found["dim"])
        return found

    def note(self, **facts: Any) -> None:
        """Change properties of the collection."""
        with self.told():
            self.client.alter_collection_properties(self.address.name, _properties(facts))

    def create(self, dim: int, index: str, parameters: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        types = require("pymilvus", "milvus").DataType
        with self.told():
            schema = self.client.create_schema(auto_id=False, enable_dynamic_field=True)
            schema.add_field("id", types.INT64, is_primary=True)
            schema.add_field("embedding", types.FLOAT_VECTOR, dim=dim)
            schema.add_field("path", types.VARCHAR, max_length=65535)
            schema.add_field("size", types.INT64)
            schema.add_field("mtime_ns", types.INT64)
            schema.add_field("hash", types.VARCHAR, max_length=64)
            schema.add_field(RECORD, types.INT64)
            self.client.create_collection(
                self.address.name,
                schema=schema,
                index_params=self._index(index, parameters),
                properties=_properties({"format": _FORMAT, **facts}),
            )

    def _index(self, index: str, parameters: Mapping[str, int]) -> Any:
        made = self.client.prepare_index_params()
        made.add_index("embedding", index_type=index, metric_type="IP", params=dict(parameters))
        return made

    def index(self) -> str:
        """The type of the collection's index."""
        with self.told():
            return str(self.client.describe_index(self.address.name, "embedding")["index_type"])

    def change_index(self, index: str, parameters: Mapping[str, int]) -> None:
        with self.told():
            self.client.release_collection(self.address.name)
            self.client.drop_index(self.address.name, "embedding")
            self.client.create_index(self.address.name, self._index(index, parameters))
            self.client.load_collection(self.address.name)

    def upsert(self, entities: Sequence[Mapping[str, Any]]) -> None:
        with self.told():
            self.client.upsert(self.address.name, list(entities))

    def delete(self, ids: Sequence[int]) -> None:
        with self.told():
            for low in range(0, len(ids), _AT_ONCE):
                self.client.delete(self.address.name, ids=list(ids[low : low + _AT_ONCE]))

    def flush(self) -> None:
        with self.told():
            self.client.flush(self.address.name)

    def query(self, expression: str, fields: Sequence[str], **more: Any) -> list[dict[str, Any]]:
        with self.told():
            options = {"consistency_level": "Strong", **more}
            return list(self.client.query(self.address.name, filter=expression, output_fields=list(fields), **options))

    def count(self) -> int:
        return int(self.query("", ["count(*)"])[0]["count(*)"])

    def among(self, field: str, values: Sequence[Any], fields: Sequence[str]) -> list[dict[str, Any]]:
        """The entities whose field has one of these values."""
        found = list[dict[str, Any]]()
        for low in range(0, len(values), _AT_ONCE):
            part = json.dumps(list(values[low : low + _AT_ONCE]), ensure_ascii=False)
            found += self.query(f"{field} in {part}", fields)
        return found

    def every(self, fields: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """All entities, some thousands at a time, in no order."""
        options = {"filter": "id >= 0", "output_fields": list(fields), "consistency_level": "Strong"}
        with self.told():
            pages = self.client.query_iterator(self.address.name, batch_size=_BUFFER, **options)
        try:
            while True:
                with self.told():
                    page = pages.next()
                if not page:
                    return
                yield list(page)
        finally:
            pages.close()

    def search(self, rows: Sequence[Any], k: int, expression: str, fields: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The nearest entities of each embedding, with their fields, by the index."""
        with self.told():
            found = self.client.search(
                self.address.name,
                data=list(rows),
                limit=k,
                filter=expression,
                output_fields=list(fields),
                search_params={"metric_type": "IP", "params": dict(self.address.search)},
            )
        return [[{"id": hit["id"], "score": hit["distance"], **hit["entity"]} for hit in hits] for hits in found]


def _properties(facts: Mapping[str, Any]) -> dict[str, str]:
    return {_PREFIX + key: json.dumps(value) if key == "columns" else str(value) for key, value in facts.items()}


def _advice(address: Address, said: str) -> str:
    low = said.lower()
    if any(word in low for word in ("auth", "permission", "privilege", "token", "password")):
        return "put USER:PASSWORD, or the token, into MILVUS_TOKEN"
    if address.lite:
        return "another process may have the file open, and it has room for one; or it is no database of Milvus Lite"
    if "connect" in low or "unavailable" in low or "deadline" in low:
        return "check that the server runs and that the address is right"
    return "what was exported before is kept; correct that, then run the same command again"
