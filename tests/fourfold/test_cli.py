"""`fourfold reproduce` keeps what finished, reports what failed, and says where the page is."""

import subprocess
import sys
import types

import pytest

from fourfold import claims, cli
from fourfold.claims import Claim, Entry, Figure


@pytest.fixture
def registry(monkeypatch):
    """Three fake claims; returns the list of calls that were made."""
    calls = []

    def make(name, error=None):
        def run(scale, out, progress):
            assert out.is_dir()
            progress(0.5, "half-way [red]")
            calls.append((name, scale))
            if error is not None:
                raise error
            return Claim(name, f"Title {name}", "paper", "text", (Figure("x", 1.0, 2.0),))

        module = types.ModuleType(f"fake_{name}")
        module.run = run  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, f"fake_{name}", module)
        return Entry(f"fake_{name}", f"Summary {name}")

    entries = {
        "one": make("one"),
        "two": make("two", error=RuntimeError("no <GPU> here")),
        "three": make("three"),
    }
    monkeypatch.setattr(claims, "CLAIMS", entries)
    return calls


def _reproduce(tmp_path, *options):
    return cli.main(["reproduce", "--out", str(tmp_path), *options])


def test_a_failing_claim_costs_no_other(registry, tmp_path, capsys):
    assert _reproduce(tmp_path) == 1
    assert [name for name, _ in registry] == ["one", "two", "three"]
    page = (tmp_path / "laptop" / "report.html").read_text()
    assert "Title one" in page and "Title three" in page
    assert "RuntimeError: no &lt;GPU&gt; here" in page
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'laptop' / 'report.html'}"
    assert "two: failed: RuntimeError" in out and "Traceback" in err


def test_finished_claims_are_reused_and_failed_ones_tried_again(registry, tmp_path):
    _reproduce(tmp_path)
    registry.clear()
    assert _reproduce(tmp_path) == 1
    assert registry == [("two", "laptop")]
    registry.clear()
    part = tmp_path / "laptop" / "three" / "part.npz"
    part.write_text("what an earlier attempt left for a resumption")
    assert _reproduce(tmp_path, "--only", "three", "--fresh") == 0
    assert registry == [("three", "laptop")] and not part.exists()
    # Those that were not asked for stay on the page.
    page = (tmp_path / "laptop" / "report.html").read_text()
    assert "Title one" in page and "Title three" in page
    registry.clear()
    assert _reproduce(tmp_path, "--only", "one", "--scale", "gpu") == 0
    assert registry == [("one", "gpu")]
    assert (tmp_path / "laptop" / "report.html").read_text() == page


def test_what_the_claim_leaves_open_is_filled_in(registry, tmp_path):
    _reproduce(tmp_path, "--only", "one")
    claim = claims.store.load(tmp_path / "laptop" / "one", "laptop")
    assert claim is not None
    expected = f"fourfold reproduce --scale laptop --only one --out {tmp_path}"
    assert claim.command == expected
    assert claim.seconds > 0 and claim.date.count("-") == 2
    assert claim.hardware["platform"] == "cpu"


def test_an_unknown_claim_lists_those_there_are(registry, tmp_path, capsys):
    assert _reproduce(tmp_path, "--only", "one", "four") == 2
    assert "unknown claim four; there are: one, two, three" in capsys.readouterr().err
    assert registry == [] and list(tmp_path.iterdir()) == []


def test_an_unusable_folder_is_an_error(registry, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["reproduce", "--only", "one", "--out", str(tmp_path / "file")]) == 2
    assert "fourfold: " in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_done(registry, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fake_three"], "run", interrupt)
    assert _reproduce(tmp_path) == 130
    assert "Title one" in (tmp_path / "laptop" / "report.html").read_text()
    assert "goes on from here" in capsys.readouterr().err


def test_an_unimportable_claim_fails_alone(registry, tmp_path, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "two", Entry("fourfold.no_such_module", "Absent"))
    assert _reproduce(tmp_path) == 1
    page = (tmp_path / "laptop" / "report.html").read_text()
    assert "ModuleNotFoundError" in page and "Title three" in page


def test_claims_are_listed(registry, capsys):
    assert cli.main(["claims"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "one    Summary one",
        "two    Summary two",
        "three  Summary three",
    ]


def test_a_wrong_scale_names_the_right_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["reproduce", "--scale", "huge"])
    assert caught.value.code == 2
    assert "laptop" in capsys.readouterr().err


def test_the_command_line_starts_without_jax():
    code = "import sys, fourfold.cli; sys.exit('jax' in sys.modules or 'orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
