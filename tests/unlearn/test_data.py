"""Records from every source, and what is said of bad ones."""

import numpy as np
import pytest

from unlearn import data
from unlearn.config import DataConfig

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")


def table(**columns):
    return pa.table({"id": ["a", "b", "c"], "label": [3, 1, 3], "u": [1, 2, 3], **columns})


def write(path, columns):
    writer = csv.write_csv if path.suffix == ".csv" else parquet.write_table
    writer(columns, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables(suffix, tmp_path):
    path = write(tmp_path / f"t{suffix}", table(v=[0.5, -1.5, 1e-3]))
    found = data.load(DataConfig(path, test=path))
    np.testing.assert_array_equal(found.ids, ["a", "b", "c"])
    np.testing.assert_array_equal(found.y, [3, 1, 3])
    np.testing.assert_array_equal(found.x, np.float32([[1, 0.5], [2, -1.5], [3, 1e-3]]))
    assert found.x.dtype == np.float32
    other = write(tmp_path / f"o{suffix}", table().rename_columns(["who", "what", "u"]))
    named = data.load(DataConfig(other, id_column="who", label_column="what"))
    np.testing.assert_array_equal(named.x, np.float32([[1], [2], [3]]))
    assert data.load_test(DataConfig(path)) is None


def test_arrays(tmp_path):
    x = np.arange(12, dtype=np.int16).reshape(3, 2, 2)
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["no", "yes", "no"]))
    found = data.load(DataConfig(str(tmp_path / "a.npz")))
    np.testing.assert_array_equal(found.ids, [0, 1, 2])
    np.testing.assert_array_equal(found.y, ["no", "yes", "no"])
    np.testing.assert_array_equal(found.x, x)
    np.savez(tmp_path / "b.npz", x=x)
    assert data.read(str(tmp_path / "b.npz"), DataConfig(), labels=False).x.shape == (3, 2, 2)


def test_digits():
    learn, score = (read(DataConfig()) for read in (data.load, data.load_test))
    assert learn.x.shape == (1438, 8, 8) and score.x.shape == (359, 8, 8)
    assert not set(learn.ids) & set(score.ids) and learn.x.max() == 1
    assert len(set(learn.ids) | set(score.ids)) == 1797


BAD = {
    "no id": (lambda t: t.drop(["id"]), "no column 'id' of ids; it has .*--data.id-column"),
    "no label": (lambda t: t.drop(["label"]), "must have arrays x and y"),
    "no feature": (lambda t: t.drop(["u"]), "columns of numbers.*found none"),
    "text": (lambda t: t.append_column("w", [["x", "y", "z"]]), r"found w \(string\)"),
    "twice": (lambda t: t.set_column(0, "id", [["a", "b", "a"]]), "1 occur more than once: a"),
    "nan": (lambda t: t.set_column(2, "u", [[1.0, np.nan, 2.0]]), "1 records.*not finite.*: b"),
    "large": (lambda t: t.set_column(2, "u", [[1.0, 1.0, 1e39]]), "not finite in float32: c"),
    "label": (lambda t: t.set_column(1, "label", [[0.5, 1.0, 2.0]]), "labels must be integers or"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_tables(change, message, tmp_path):
    path = write(tmp_path / "t.parquet", change(table()))
    with pytest.raises(ValueError, match=message):
        data.load(DataConfig(path))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data: .*x.csv is no file"):
        data.load(DataConfig(str(tmp_path / "x.csv")))
    (tmp_path / "x.csv").write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="x.csv can't be read"):
        data.load(DataConfig(str(tmp_path / "x.csv")))
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2)), y=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"found float64 \(3, 2\), int64 \(2,\)"):
        data.load(DataConfig(str(tmp_path / "x.npz")))
    with pytest.raises(FileNotFoundError, match="mnist is not in"):
        data.load(DataConfig("mnist", data_dir=str(tmp_path)))
