"""Prompt rules and re-ranking of a service: the results of `clipret-search query` with the same options."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clipret import Bundle, Gallery
from clipret.cli import main
from clipret.cli.query import query
from clipret.cli.serve import serve_command
from clipret.errors import ClipretError
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank

pytest.importorskip("fastapi", reason="needs the extra serve")
from clipret.server.snapshot import SearchSettings

pytestmark = pytest.mark.slow

RULES = """
[[rule]]
name = "vehicle"
words = ["car", "truck"]
strip = ["a", "car"]
templates = ["{} grey", "blue {}"]

[[rule]]
name = "rest"
templates = ["{}", "white {}"]
"""
TEXTS = ("a red car", "green", "grey truck", "红色")
REFERENCE = ("red", "grey", "blue cyan", "black", "a yellow car")


def query_results(gallery: Path, *options: str, texts: tuple[str, ...] = TEXTS) -> Any:
    """The results of each text by `clipret-search query --json`."""
    arguments = ["query", str(gallery), *texts, "-k", "9", "--json", *options]
    result = CliRunner().invoke(main, arguments, prog_name="clipret-search", catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return [[line(hit) for hit in entry["hits"]] for entry in json.loads(result.stdout)]


def response_results(reply: Any) -> Any:
    assert reply.status == 200, reply.body
    return [[line(hit) for hit in entry["hits"]] for entry in reply.json["results"]]


def line(hit: Any) -> tuple[Any, ...]:
    return hit["rank"], hit["id"], hit["score"], hit["path"]


@pytest.mark.parametrize(
    ("options", "rerank"),
    [
        ("", Rerank()),
        ("adapt=5,adapt_weight=0.4", Rerank(adapt=5, adapt_weight=0.4)),
        ("k_reciprocal=7", Rerank(k_reciprocal=7)),
        ("hubness=nnn,neighbours=2", Rerank(hubness="nnn", neighbours=2)),
        ("hubness=dual-softmax,temperature=20", Rerank(hubness="dual-softmax", temperature=20)),
        ("adapt=3,hubness=nnn,k_reciprocal=6", Rerank(adapt=3, hubness="nnn", k_reciprocal=6)),
    ],
)
@pytest.mark.parametrize("ruled", [False, True])
def test_a_service_returns_the_results_of_query(
    serving: Callable[..., Any], listed_gallery: Path, tmp_path: Path, options: str, rerank: Rerank, ruled: bool
) -> None:
    arguments, prompts, reference = ["--rerank", options] if options else [], Prompts(), ()
    if ruled:
        (tmp_path / "rules.toml").write_text(RULES)
        arguments += ["--prompts", str(tmp_path / "rules.toml")]
        prompts = Prompts.read(tmp_path / "rules.toml")
    if rerank.hubness != "none":
        (tmp_path / "reference.txt").write_text("\n".join(REFERENCE))
        arguments += ["--rerank", f"reference={tmp_path / 'reference.txt'}"]
        reference = REFERENCE
    client = serving(listed_gallery, settings=SearchSettings(prompts.forms, rerank, reference))
    expected = query_results(listed_gallery, *arguments)
    assert response_results(client.get("/search", q=TEXTS, k=9)) == expected
    # The results of a text do not depend on the other texts of a request.
    assert [response_results(client.get("/search", q=text, k=9))[0] for text in TEXTS] == expected
    assert response_results(client.get("/search", q="green", k=2)) == [expected[1][:2]]
    only = ["--where", "number < 2", "--exclude", "red/0.jpg"]
    number = Gallery.open(listed_gallery).id_of("red/0.jpg")
    reply = client.get("/search", q=TEXTS, k=9, where="number < 2", exclude=number)
    assert response_results(reply) == query_results(listed_gallery, *arguments, *only)
    assert client.get("/galleries").json[0]["rerank"] == rerank.steps
    no_results = client.get("/search", q="red", where="number > 99")
    assert response_results(no_results) == [[]]
    if rerank.steps or ruled:
        assert expected != query_results(listed_gallery)
    if rerank.steps:
        assert "min_score is a cosine" in client.get("/search", q="red", min_score=0.1).error


def test_re_ranking_of_images_and_of_a_changed_gallery(
    serving: Callable[..., Any], listed_gallery: Path, colour_folder: Path
) -> None:
    options = ["--rerank", "adapt=4,k_reciprocal=8"]
    client = serving(listed_gallery, token="secret", settings=SearchSettings(rerank=Rerank(adapt=4, k_reciprocal=8)))
    file = colour_folder / "blue" / "1.jpeg"
    reply = client.upload(
        "/search", [file.read_bytes()], {"search": '{"queries": [{"parts": [{"image": 0}]}], "k": 9}'}
    )
    assert response_results(reply) == query_results(listed_gallery, "--image", str(file), *options, texts=())
    before = query_results(listed_gallery, *options)
    head = {"Authorization": "Bearer secret"}
    for number in (2, 5):
        assert client.request("DELETE", f"/galleries/gallery/images/{number}", headers=head).status == 200
    after = query_results(listed_gallery, *options)
    assert after != before
    assert response_results(client.get("/search", q=TEXTS, k=9)) == after


def test_hubness_of_a_changed_gallery_is_measured_again(
    serving: Callable[..., Any], listed_gallery: Path, tmp_path: Path
) -> None:
    (tmp_path / "reference.txt").write_text("\n".join(REFERENCE))
    options = ["--rerank", f"hubness=nnn,reference={tmp_path / 'reference.txt'}"]
    client = serving(
        listed_gallery, token="secret", settings=SearchSettings(rerank=Rerank(hubness="nnn"), reference=REFERENCE)
    )
    image = (tmp_path / "images" / "green" / "2.png").read_bytes() + b" "
    added = client.upload("/galleries/gallery/add", [image], Authorization="Bearer secret")
    assert added.status == 200, added.body
    expected = [[(*one[:3], Path(one[3]).name) for one in hits] for hits in query_results(listed_gallery, *options)]
    results = response_results(client.get("/search", q=TEXTS, k=9))
    assert [[(*one[:3], Path(one[3]).name) for one in hits] for hits in results] == expected
    assert 13 in {number for hits in results for _, number, *_ in hits}


def test_re_ranking_of_an_empty_gallery(serving: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "empty", Bundle.open(tiny_bundle), tmp_path):
        pass
    rerank = Rerank(adapt=5, hubness="dual-softmax", k_reciprocal=5)
    client = serving(tmp_path / "empty", settings=SearchSettings(rerank=rerank, reference=("red",)))
    assert response_results(client.get("/search", q=["red", "blue"])) == [[], []]


def test_hubness_without_reference_is_refused() -> None:
    with pytest.raises(ClipretError, match="name fixed texts with --rerank reference=FILE"):
        SearchSettings(rerank=Rerank(hubness="nnn"))


def test_the_command_has_the_options_of_query(listed_gallery: Path, tmp_path: Path) -> None:
    def error_of(*options: str) -> str:
        result = CliRunner().invoke(main, ["serve", str(listed_gallery), *options], prog_name="clipret-search")
        assert result.exit_code in (1, 2)
        return result.stderr

    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "reference.txt").write_text("\n".join(REFERENCE))
    assert "name fixed texts with --rerank reference=FILE" in error_of("--rerank", "hubness=nnn")
    rules = str(tmp_path / "rules.toml")
    assert "either templates or one file" in error_of("--prompts", "a {}", "--prompts", rules)
    assert "is neither a template" in error_of("--prompts", "a car")
    of_query = {option for one in query.params for option in one.opts}
    of_serve = {option for one in serve_command.params for option in one.opts}
    assert {"--prompts", "--rerank", "--device", "--backend", "--encoder"} <= of_query & of_serve
    options = ["--prompts", "rules.toml", "--rerank", "adapt=4,hubness=nnn,reference=reference.txt"]
    command = [
        sys.executable,
        "-m",
        "clipret.cli",
        "serve",
        str(listed_gallery),
        "--port",
        "0",
        "--encoder",
        "threads=1",
    ]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as it:
        try:
            assert it.stdout is not None
            match = re.search(r":(\d+)/", it.stdout.readline())
            assert match
            from http.client import HTTPConnection

            connection = HTTPConnection("127.0.0.1", int(match[1]), timeout=60)
            connection.request("GET", "/search?q=a+red+car&k=9")
            hits = [line(hit) for hit in json.load(connection.getresponse())["results"][0]["hits"]]
            connection.close()
        finally:
            it.terminate()
    rerank_option = f"adapt=4,hubness=nnn,reference={tmp_path / 'reference.txt'}"
    options = ["--prompts", str(tmp_path / "rules.toml"), "--rerank", rerank_option]
    [expected] = query_results(listed_gallery, *options, texts=("a red car",))
    assert [one[1] for one in hits] == [one[1] for one in expected]
    np.testing.assert_allclose([one[2] for one in hits], [one[2] for one in expected])
