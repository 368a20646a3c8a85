"""A command line's errors in one line, and files that are replaced whole or not at all."""

import pytest

from fourfold.runtime import host_arrays
from fourfold.runtime.commands import in_full, run_command


class MendableError(Exception):
    """Nobody but `troubles` knows it."""


def call(error, *words, troubles=()):
    def sing(words):
        if error is not None:
            raise error
        print(words)

    run_command("choir", "usage: choir sing", {"sing": sing}, words, troubles)


def test_a_command_gets_its_words(capsys):
    call(None, "sing", "--loud", "yes")
    assert capsys.readouterr().out == "['--loud', 'yes']\n"


@pytest.mark.parametrize("words", [(), ("-h",), ("--help", "sing")])
def test_usage(words, capsys):
    call(None, *words)
    assert capsys.readouterr().out == "usage: choir sing\n"


def test_an_unknown_command_is_named():
    with pytest.raises(SystemExit, match=r"^choir: unknown command 'hum'; allowed: sing$"):
        call(None, "hum")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError, MemoryError])
def test_what_a_user_can_mend_is_one_line(kind, monkeypatch):
    monkeypatch.delenv("FOURFOLD_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match=r"^choir sing: no voice$"):
        call(kind("no voice"), "sing")
    monkeypatch.setenv("FOURFOLD_TRACEBACK", "1")
    with pytest.raises(kind):
        call(kind("no voice"), "sing")


def test_what_is_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.delenv("FOURFOLD_TRACEBACK", raising=False)
    with pytest.raises(MendableError):
        call(MendableError("hoarse"), "sing")
    with pytest.raises(SystemExit, match="hoarse"):
        call(MendableError("hoarse"), "sing", troubles=(MendableError,))


def test_short_names():
    assert in_full(["--d=--d", "--d", "d"], {"--d": "--data"}) == ["--data=--d", "--data", "d"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with host_arrays.replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), host_arrays.replacing(path) as draft:
        draft.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
