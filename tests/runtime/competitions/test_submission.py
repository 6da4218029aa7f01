"""Answers to competitions, from a gallery to the file; and every answer that a scorer would reject."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clipret.cli import main
from clipret.competitions.submission import Sample, image_names, product_answer, traffic_answer
from clipret.errors import ClipretError


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    result = run(*arguments, code=1)
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def gallery(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> Path:
    """Twelve images in one folder, as both competitions have them: red-0.jpg … grey-2.png."""
    flat = tmp_path / "image"
    flat.mkdir()
    for file in sorted(colour_folder.rglob("*.*")):
        file.rename(flat / f"{file.parent.name}-{file.name}")
    run("index", tiny_bundle, flat, tmp_path / "gallery")
    return tmp_path / "gallery"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_traffic_from_gallery_to_file(gallery: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "test.txt", "A red Sedan.\nthe blue Audi\n\n")
    out = tmp_path / "answer.json"
    result = run("submit", gallery, texts, out, "--format", f"images={tmp_path / 'image'}")
    assert "2 texts" in result.stdout
    answer = json.loads(out.read_text())
    assert [entry["text"] for entry in answer["results"]] == ["A red Sedan.", "the blue Audi"]
    for entry, colour in zip(answer["results"], ("red", "blue"), strict=True):
        assert len(entry["image_names"]) == 10
        assert {name.split("-")[0] for name in entry["image_names"][:3]} == {colour}
    # The same from a result file that another command made.
    found = write(tmp_path / "found.json", run("query", gallery, "--texts", texts, "-k", 10, "--json").stdout)
    run("submit", found, texts, tmp_path / "again.json", "--format", f"images={tmp_path / 'image'}")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()
    merged = write(tmp_path / "merged.json", run("merge", gallery, gallery, "--texts", texts).stdout)
    run("submit", merged, texts, tmp_path / "merged-answer.json")
    assert (tmp_path / "merged-answer.json").read_bytes() == out.read_bytes()


def test_traffic_with_prompts_and_re_ranking(gallery: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "test.txt", "a crimson car\nblue\n")
    prompts = write(tmp_path / "p.toml", '[[rule]]\nname = "c"\nwords = ["crimson"]\ntemplates = ["red {}"]\n')
    steps = ("--rerank", "adapt=3,hubness=nnn,k_reciprocal=8")
    run("submit", gallery, texts, tmp_path / "a.json", "--prompts", prompts, *steps)
    names = json.loads((tmp_path / "a.json").read_text())["results"][0]["image_names"]
    assert {name.split("-")[0] for name in names[:3]} == {"red"}
    found = json.loads(run("query", gallery, "--texts", texts, "--prompts", prompts, *steps, "--json").stdout)
    assert [hit["path"] for hit in found[0]["hits"]] == names


def test_a_refused_answer_writes_nothing(gallery: Path, tmp_path: Path) -> None:
    texts, out = write(tmp_path / "test.txt", "red\nblue\n"), tmp_path / "answer.json"
    (tmp_path / "image/red-0.jpg").unlink()
    assert "the image red-0.jpg, which is not among the test images" in fails(
        "submit", gallery, texts, out, "--format", f"images={tmp_path / 'image'}"
    )
    assert "has 12 images, the scorer wants 20" in fails("submit", gallery, texts, out, "-k", 20)
    assert "text 1 of" in fails("submit", gallery, write(tmp_path / "b.txt", " \nred\n"), out)
    assert "must end in .json" in fails("submit", gallery, texts, tmp_path / "answer.txt")
    assert "--format one_to_one is for .csv" in fails("submit", gallery, texts, out, "--format", "one_to_one")
    assert "pass --format sample=FILE" in fails("submit", gallery, texts, tmp_path / "answer.csv")
    found = write(tmp_path / "found.json", run("query", gallery, "red", "--json").stdout)
    assert "has no results for text 2 ('blue')" in fails("submit", found, texts, out)
    assert "is a result file: give --rerank" in fails("submit", found, texts, out, "--rerank", "adapt=5")
    assert not out.exists()


def test_products_leave_out_the_training_images(gallery: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "caption\tpath\nred thing\tred-0.jpg\nblue thing\tblue-0.jpg\n")
    queries = write(tmp_path / "test_query.csv", 'caption\n"red, bright"\nblue\n红色\n')
    sample = write(tmp_path / "sample.csv", "\ufefftitle,path\r\nx,red-1.jpeg\r\n")
    arguments = ("submit", gallery, queries, tmp_path / "submit.csv", "--format", f"sample={sample}")
    result = run(*arguments, "--leave-out", train, "--image-root", tmp_path / "image")
    assert "2 images of" in result.stderr
    lines = (tmp_path / "submit.csv").read_bytes().decode().split("\r\n")
    assert lines[0] == "\ufefftitle,path"
    assert lines[1].startswith('"red, bright",red-')
    assert lines[2].startswith("blue,blue-")
    assert lines[3].startswith("红色,red-")
    assert lines[4:] == [""]
    assert not any(name in line for line in lines for name in ("red-0.jpg", "blue-0.jpg"))
    other = write(tmp_path / "other.csv", "caption,path\na,b.jpg\n")
    assert "none of the 1 images" in fails(*arguments, "--leave-out", other)


def test_products_one_to_one(gallery: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="needs clipret[assignment]")
    queries = write(tmp_path / "q.csv", "caption\n" + "red\n" * 2 + "红色\nblue\n")
    sample = write(tmp_path / "sample.csv", "path\nred-0\n")
    out = tmp_path / "submit.csv"
    for arguments in ((), ("--rerank", "hubness=nnn")):
        run("submit", gallery, queries, out, "--format", f"sample={sample}", "--format", "one_to_one", *arguments)
        names = out.read_text().split()
        assert names[0] == "path"
        assert {name.split("-")[0] for name in names[1:4]} == {"red"}
        assert len(set(names)) == 5
    found = write(tmp_path / "found.json", run("query", gallery, "--texts", queries, "-k", 12, "--json").stdout)
    arguments = (
        "submit",
        found,
        queries,
        tmp_path / "again.csv",
        "--format",
        f"sample={sample}",
        "--format",
        "names=stem",
    )
    run(*arguments, "--format", "one_to_one")
    assert sorted((tmp_path / "again.csv").read_text().split()[1:4]) == ["red-0", "red-1", "red-2"]
    shorter = write(tmp_path / "short.json", run("query", gallery, "--texts", queries, "-k", 2, "--json").stdout)
    assert "can have an image of its own" in fails("submit", shorter, *arguments[2:], "--format", "one_to_one")


def sample_of(folder: Path, text: str) -> Sample:
    return Sample.read(write(folder / "sample.csv", text))


def test_the_sample_s_shape(tmp_path: Path) -> None:
    only = sample_of(tmp_path, "image\na/1.jpg\n")
    assert product_answer(only, ["q", "r"], ["a/1.jpg", "a/1.jpg"]) == "image\na/1.jpg\na/1.jpg\n"
    tabs = sample_of(tmp_path, 'path\ttitle\n1.jpg\tsay "q"\n')
    assert product_answer(tabs, ['say "q"'], ["1.jpg"]) == 'path\ttitle\n1.jpg\tsay "q"\n'
    with pytest.raises(ClipretError, match="holds a tab"):
        product_answer(tabs, ["q\tr", "s"], ["1.jpg", "1.jpg"])
    with pytest.raises(ClipretError, match="a column 'score' that is neither"):
        sample_of(tmp_path, "caption,path,score\nq,1.jpg,0\n")


def test_how_the_sample_calls_images(tmp_path: Path) -> None:
    paths = ["a/1.jpg", "b/2.jpg"]
    for text, form in (("a/1.jpg\nb/2.jpg", "path"), ("1.jpg", "name"), ("2\n1", "stem")):
        assert sample_of(tmp_path, f"path\n{text}\n").form(paths) == form
    with pytest.raises(ClipretError, match=r"calls an image '3.jpg'"):
        sample_of(tmp_path, "path\n1.jpg\n3.jpg\n").form(paths)
    with pytest.raises(ClipretError, match="say how the answer names"):
        sample_of(tmp_path, "path\n1.jpg\n2\n").form(paths)
    with pytest.raises(ClipretError, match=r"a/1.jpg and b/1.png would both be called 1: use another --format names=…"):
        image_names(["a/1.jpg", "b/1.png"], "stem")


def test_product_answers_that_would_be_rejected(tmp_path: Path) -> None:
    sample = sample_of(tmp_path, "caption,path\nq,1.jpg\nr,1.jpg\n")
    for texts, found, known, once, message in (
        ([], [], None, False, "no texts"),
        (["q", "r"], ["1.jpg"], None, False, "2 texts and 1 answers"),
        (["q", " "], ["1.jpg", "2.jpg"], None, False, "text 2 is blank"),
        (["r", "q"], ["1.jpg", "2.jpg"], None, False, "query 1 is 'r', in .* 'q'"),
        (["q"], ["1.jpg"], None, False, "has 2 rows for 1 queries"),
        (["q", "r"], ["1.jpg", "2.jpg"], {"1.jpg"}, False, r"query 2 \('r'\) has the image 2.jpg"),
        (["q", "r"], ["1.jpg", "1.jpg"], None, True, "1.jpg twice"),
    ):
        with pytest.raises(ClipretError, match=message):
            product_answer(sample, texts, found, known, once=once)
    assert product_answer(sample, ["q", "r"], ["1.jpg", "1.jpg"]).count("1.jpg") == 2


def test_traffic_answers_that_would_be_rejected() -> None:
    ten = [f"{number}.jpg" for number in range(10)]
    for texts, found, known, message in (
        (["a", "b"], [ten], None, "2 texts and 1 answers"),
        (["a", ""], [ten, ten], None, "text 2 is blank"),
        (["a"], [ten[:9]], None, r"text 1 \('a'\) has 9 images, the scorer wants 10"),
        (["a"], [[*ten, "11.jpg"]], None, "has 11 images"),
        (["a"], [[*ten[:9], "0.jpg"]], None, "0.jpg twice"),
        (["a", "b"], [ten, ten], set(ten[1:]), r"text 1 \('a'\) has the image 0.jpg, which is not among"),
    ):
        with pytest.raises(ClipretError, match=message):
            traffic_answer(texts, found, known)
    same = json.loads(traffic_answer(["ein Bus", "ein Bus"], [ten, ten], set(ten)))
    assert same == {"results": [{"text": "ein Bus", "image_names": ten}] * 2}


def test_merge_by_rule(gallery: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    run("index", tiny_bundle, tmp_path / "image", tmp_path / "second")
    texts = write(tmp_path / "t.txt", "a red sedan\ngreen man\nblue\n")
    prompts = write(
        tmp_path / "p.toml",
        '[[rule]]\nname = "car"\nwords = ["sedan"]\n[[rule]]\nname = "who"\nmatch = "man"\ntemplates = ["{} {}"]\n',
    )
    base = ("merge", gallery, tmp_path / "second", gallery, "--texts", texts, "--prompts", prompts, "-k", 4)
    only = ("--only", "car", "--only", "who", "--only", "other")
    found = json.loads(run(*base, *only, "--how", "sum").stdout)
    assert [one["query"] for one in found] == ["a red sedan", "green man", "blue"]
    assert [one["hits"][0]["path"].split("-")[0] for one in found] == ["red", "green", "blue"]
    plain = json.loads(run("query", gallery, "a red sedan", "-k", 4, "--json").stdout)[0]["hits"]
    assert [(hit["path"], hit["score"]) for hit in found[0]["hits"]] == [(h["path"], h["score"]) for h in plain]
    assert "no source answers the text 'blue'" in fails(*base, "--only", "car", "--only", "who", "--only", "who")
    assert "2 --only for 3 sources" in fails(*base, "--only", "car", "--only", "who")
    assert "has no rule 'van': use all, other, car, who" in fails(*base, *only[:4], "--only", "van")
    assert "1 --weight for 3 sources" in fails(*base, "--weight", 2)
    assert run(*base, "--weight", 2, "--weight", 1, "--weight", 1, "--how", "rrf").stdout
