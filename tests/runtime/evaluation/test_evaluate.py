"""Evaluation: relevant images from annotations files and from attributes, any metric, any way of ranking."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, Searcher
from clipret.cli import main
from clipret.evaluation.evaluate import measure, read_attribute_truth
from clipret.evaluation.metrics import Metric, average_precision


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def gallery(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    """Twelve images with their colour, number and things as metadata."""
    lines = ["path,colour,number,things"]
    for file in sorted(colour_folder.rglob("*.*")):
        things = ("hat", "hat; hand bag", "")[int(file.stem)]
        lines.append(f"{file.relative_to(colour_folder)},{file.parent.name},{file.stem},{things}")
    (colour_folder / "list.csv").write_text("\n".join(lines) + "\n")
    run("index", tiny_bundle, colour_folder / "list.csv", tmp_path / "gallery")
    return tmp_path / "gallery"


@pytest.fixture
def searcher(gallery: Path, tiny_bundle: Path) -> Searcher:
    return Searcher(Gallery.open(gallery), Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu")))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_images_are_relevant_by_their_attributes(searcher: Searcher, tmp_path: Path) -> None:
    queries = write(
        tmp_path / "q.csv",
        "caption,colour,number,things\n"
        'red,red,,\nthe first blue,blue,0,\nbag,,,hand bag\nboth,,,"hand bag, hat"\npink,pink,,\n',
    )
    truth = read_attribute_truth(searcher, queries, equal=["colour", "number"], includes=["things"])
    relevant = {text: sorted(paths) for text, paths in truth.relevant.items()}
    bags = [f"{colour}/1.jpeg" for colour in ("blue", "green", "grey", "red")]
    assert relevant == {
        "red": ["red/0.jpg", "red/1.jpeg", "red/2.png"],
        "the first blue": ["blue/0.jpg"],
        "bag": bags,
        "both": bags,
    }
    assert truth.unanswerable == 1


def test_numbers_are_equal_in_any_notation(searcher: Searcher, tmp_path: Path) -> None:
    queries = write(tmp_path / "q.csv", "caption,number,things\none,001,\ntwo,2.0,\nhat,,hat\nnone,,;\n")
    with pytest.raises(ClipretError, match="the query 'none' has no attribute"):
        read_attribute_truth(searcher, queries, equal=["number"], includes=["things"])
    queries = write(queries, queries.read_text().replace("none,,;\n", ""))
    truth = read_attribute_truth(searcher, queries, equal=["number"], includes=["things"])
    assert {text: {Path(path).stem for path in paths} for text, paths in truth.relevant.items()} == {
        "one": {"1"},
        "two": {"2"},
        "hat": {"0", "1"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption,color\nred,red\n", "has no column 'colour': its columns are caption, color"),
        ("caption,colour\nred,\n", "the query 'red' has no attribute"),
        ("caption,colour\nred,red\n ,blue\n", "query 2 is blank"),
        ("caption,colour\nred,red\nred,blue\n", "is there twice"),
        ("caption,colour\nred,pink\n", "no image of .* matches any"),
    ],
)
def test_invalid_annotations_files(text: str, message: str, searcher: Searcher, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match=message):
        read_attribute_truth(searcher, write(tmp_path / "q.csv", text), equal=["colour"])


def test_measure_is_the_mean_over_the_queries(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = write(tmp_path / "q.csv", "caption,colour\nred blue,red\ngreen,green\ngrey,blue\n")
    truth = read_attribute_truth(searcher, queries, equal=["colour"])
    metrics = [Metric.parse(name) for name in ("mAP", "mAP@4", "recall@1")]
    values = measure(searcher, truth, metrics)
    assert list(values) == ["mAP", "mAP@4", "recall@1"]
    expected = [
        average_precision([hit.path for hit in hits], set(truth.relevant[text]))
        for text, hits in zip(truth.relevant, searcher.search(list(truth.relevant), 12), strict=True)
    ]
    assert 0.2 < np.mean(expected) < 0.9
    assert values["mAP"] == pytest.approx(np.mean(expected))
    monkeypatch.setattr("clipret.evaluation.evaluate._RANKS", 12)  # one query at a time
    assert measure(searcher, truth, metrics) == values


def test_eval_by_attribute_with_chosen_metrics(gallery: Path, tmp_path: Path) -> None:
    queries = write(tmp_path / "q.csv", "caption,colour\nred,red\nblue,blue\npink,pink\n")
    result = run("eval", gallery, queries, "--equal", "colour", "--metric", "mAP", "--metric", "challenge", "--json")
    assert json.loads(result.stdout) == {
        "queries": 2,
        "mAP": 1.0,
        "challenge": 1.0,
        "missing_images": 0,
        "queries_left_out": 1,
    }
    table = run("eval", gallery, queries, "--equal", "colour").stdout
    assert "median rank" in table
    assert "there is no metric 'top1'" in run("eval", gallery, queries, "--metric", "top1", code=1).stderr


def test_eval_measures_re_ranking_and_prompts(gallery: Path, tmp_path: Path) -> None:
    queries = write(tmp_path / "q.csv", "caption,colour\ncar red,red\ncar blue,blue\n")
    prompts = write(tmp_path / "p.toml", '[[rule]]\nname = "all"\nstrip = ["red"]\ntemplates = ["{} green"]\n')
    plain = ("eval", gallery, queries, "--equal", "colour", "--json")
    assert json.loads(run(*plain).stdout)["recall_at_1"] == 1.0
    assert json.loads(run(*plain, "--prompts", prompts).stdout)["recall_at_1"] < 1.0
    steps = ("--rerank", "adapt=3,hubness=nnn", "--rerank", "neighbours=1,k_reciprocal=6")
    values = json.loads(run(*plain, *steps).stdout)
    assert list(values)[:5] == ["queries", "recall@1", "recall@5", "recall@10", "mAP@10"]
    assert values["mAP@10"] == 1.0
    reference = write(tmp_path / "reference.txt", "grey\nblue\n")
    assert run(*plain, "--rerank", f"hubness=dual-softmax,reference={reference}").stdout
    assert "reference= needs hubness" in run(*plain, "--rerank", f"reference={reference}", code=1).stderr
    assert "--html shows the plain ranking" in run(*plain, *steps, "--html", tmp_path / "p.html", code=1).stderr


def test_eval_measures_a_result_file(gallery: Path, tmp_path: Path) -> None:
    queries = write(tmp_path / "q.csv", "caption,colour\nred blue,red\nblue,blue\n")
    plain = ("eval", gallery, queries, "--equal", "colour", "--json", "--metric", "mAP", "--metric", "mAP@5")
    full = write(tmp_path / "r.json", run("query", gallery, "--texts", queries, "-k", 12, "--json").stdout)
    assert json.loads(run(*plain, "--results", full).stdout) == json.loads(run(*plain).stdout)
    few = write(tmp_path / "f.json", run("query", gallery, "--texts", queries, "-k", 2, "--json").stdout)
    short = json.loads(run(*plain, "--results", few).stdout)
    assert short["mAP"] < json.loads(run(*plain).stdout)["mAP"]
    one = write(tmp_path / "o.json", run("query", gallery, "blue", "--json").stdout)
    assert "has no results for 'red blue'" in run(*plain, "--results", one, code=1).stderr
    assert "is a finished ranking" in run(*plain, "--results", few, "--rerank", "adapt=3", code=1).stderr


def test_query_takes_prompts(gallery: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.toml", '[[rule]]\nname = "all"\nwords = ["azure"]\ntemplates = ["{} blue"]\n')
    results = json.loads(run("query", gallery, "azure", "-k", 3, "--prompts", prompts, "--json").stdout)
    assert {hit["path"].split("/")[0] for hit in results[0]["hits"]} == {"blue"}
    assert run("query", gallery, "azure", "--prompts", prompts, "--prompts", "{}", code=2).stderr
