import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from clipret.console import DefaultGroup, show_table
from clipret.errors import ClipretError, printable
from clipret.files import new_folder, write_file


def test_a_file_has_its_old_or_its_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.txt"
    write_file(target, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ClipretError, match=r"report\.txt cannot be written: No space left on device"):
            write_file(target, "new")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.txt"]
    write_file(target, b"new")
    assert target.read_bytes() == b"new"


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    def half() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("half")
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep/er/out") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "deep/er/out/a").read_text() == "whole"


def test_an_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    with pytest.raises(ClipretError, match="is not empty"), new_folder(tmp_path / "out"):
        pass

    def half() -> None:
        with new_folder(tmp_path / "out", overwrite=True):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (the test raises it)
        half()
    assert (tmp_path / "out/old").exists()
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(ClipretError, match="is a file"), new_folder(tmp_path / "file"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no locks of folders")
def test_folders_of_killed_processes_are_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time; from pathlib import Path; from clipret.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        [left] = tmp_path.iterdir()
        (tmp_path / ".out.0123abcd.old").mkdir()
        (tmp_path / ".out.0123abcd.old/a").write_text("old")
        (tmp_path / ".other.0123abcd.tmp").mkdir()
        monkeypatch.setattr("clipret.files._MIN_AGE", 0)
        with pytest.raises(ClipretError, match="not empty"), new_folder(tmp_path / "out"):
            pass
        # The old folder is restored, which its killed process could not do; the folder that is being written stays.
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([left.name, ".other.0123abcd.tmp", "out"])
        writer.kill()
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "b").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.0123abcd.tmp", "out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out/a").exists()


def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


def test_an_error_is_always_one_line() -> None:
    @click.group("tool", cls=DefaultGroup)
    def tool() -> None: ...

    @tool.command("export")
    @click.argument("source")
    def export(source: str) -> None:
        raise ClipretError(f"no {source} a\nb\udcff.jpg")

    result = CliRunner().invoke(tool, ["file"], prog_name="tool")  # the default command, left out
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "tool: no file a\\nb\\udcff.jpg\n"


def test_printable_does_not_change_words() -> None:
    assert printable("红色的 car – é.jpg") == "红色的 car – é.jpg"


def test_tables_with_chinese_are_aligned() -> None:
    table = show_table(("name", "n"), [("红色", "7"), ("a", "12")])
    assert table.splitlines() == ["name   n", "红色   7", "a     12"]
