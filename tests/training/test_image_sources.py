import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_rsst.training import data as data_module
from mamba_rsst.training.data import ImageDataConfig, load_image_data


datasets = pytest.importorskip("datasets")
SIZE = 9


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(value, size=(SIZE, SIZE), mode="RGB"):
    """PNG bytes of one colour (value, value + 1, value + 2)."""
    color = value if mode == "L" else (value, value + 1, value + 2)
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, **files):
    """One parquet file per keyword: a dictionary of columns."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name, columns in files.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns), path)
    return folder


def rows(labels, image="image", label="label", start=0):
    return {image: [png(start + i) for i in range(len(labels))], label: labels}


def with_names(folder, split, names, labels):
    features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    images = [Image.open(io.BytesIO(png(i))) for i in range(len(labels))]
    folder.mkdir(exist_ok=True)
    rows = datasets.Dataset.from_dict({"pic": images, "kind": labels}, features=features)
    rows.to_parquet(folder / f"{split}.parquet")


def load(folder, image_size=SIZE, num_channels=3, **settings):
    return load_image_data(
        ImageDataConfig(path=str(folder), **settings), image_size=image_size, num_channels=num_channels
    )


@pytest.mark.parametrize(
    "files",
    [
        {"train": [0, 1, 2, 1], "test": [2, 0]},
        {"train-00000-of-00002": [0, 1], "train-00001-of-00002": [2, 1], "test-00000-of-00001": [2, 0]},
        {"data/train-00000-of-00001-0123abc": [0, 1, 2, 1], "data/test-00000-of-00001-0123abc": [2, 0]},
        {"train/0000": [0, 1], "train/0001": [2, 1], "test/0000": [2, 0], "other/0000": [0]},
    ],
    ids=["plain", "shards", "hub clone", "split folders"],
)
def test_parquet_folder(tmp_path, files):
    start = {"train": 0, "test": 50}
    contents = {}
    for name, labels in files.items():
        split = "test" if "test" in name else "train"
        contents[name] = rows(labels, start=start[split])
        start[split] += len(labels)
    loaded = load(write(tmp_path, **contents))
    assert loaded.train.labels.tolist() == [0, 1, 2, 1]
    assert loaded.eval.labels.tolist() == [2, 0]
    assert loaded.train.images[:, :, 3, 5].tolist() == [[i, i + 1, i + 2] for i in range(4)]
    assert loaded.eval.images[:, 0, 0, 0].tolist() == [50, 51]
    assert loaded.id2label == {0: "0", 1: "1", 2: "2"}


def test_image_folder(tmp_path, monkeypatch):
    value = 0
    for split, count in (("train", 3), ("val", 2)):
        for name in ("dog", "cat"):
            for i in range(count):
                path = tmp_path / "set" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(value))
                value += 10
    loaded = load(tmp_path / "set", eval_split="val")
    assert loaded.id2label == {0: "cat", 1: "dog"}
    assert sorted(zip(loaded.train.images[:, 0, 0, 0].tolist(), loaded.train.labels.tolist())) == [
        (0, 1),
        (10, 1),
        (20, 1),
        (30, 0),
        (40, 0),
        (50, 0),
    ]
    assert len(loaded.eval) == 4
    with pytest.raises(ValueError, match=r"no split 'test'; choose from \['train', 'val'\]"):
        load(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load("set", eval_split="val").eval.images, loaded.eval.images)
    assert torch.equal(load("./set", eval_split="val").eval.labels, loaded.eval.labels)


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("pixel_values", "labels"), ("image", "label")])
def test_columns_are_found_by_name(tmp_path, image, label):
    columns = rows([0, 1], image, label) | {"coarse": ["x", "y"]}
    assert load(write(tmp_path, train=columns, test=columns)).train.labels.tolist() == [0, 1]


def test_columns_are_found_by_type_and_names_kept(tmp_path):
    with_names(tmp_path, "train", ["ant", "bee", "cow"], [0, 1, 0])
    with_names(tmp_path, "test", ["ant", "bee", "cow"], [1, 0])
    loaded = load(tmp_path)
    assert loaded.id2label == {0: "ant", 1: "bee", 2: "cow"}  # a class without an image stays a class
    assert loaded.eval.labels.tolist() == [1, 0]


def test_splits_that_number_their_classes_differently(tmp_path):
    with_names(tmp_path, "train", ["ant", "bee"], [0, 1, 0])
    with_names(tmp_path, "test", ["bee", "ant"], [0, 0, 1])
    assert load(tmp_path).eval.labels.tolist() == [1, 1, 0]


def test_chosen_columns(tmp_path):
    columns = rows([0, 1, 0]) | {"second": [png(100), png(101), png(102)], "other": [1, 1, 0]}
    loaded = load(write(tmp_path, train=columns, test=columns), image_column="second", label_column="other")
    assert loaded.train.labels.tolist() == [1, 1, 0]
    assert loaded.train.images[:, 0, 0, 0].tolist() == [100, 101, 102]


def test_string_labels(tmp_path):
    loaded = load(write(tmp_path, train=rows(["pear", "fig", "pear"]), test=rows(["pear", "fig"])))
    assert loaded.id2label == {0: "fig", 1: "pear"}
    assert loaded.train.labels.tolist() == [1, 0, 1]
    assert loaded.eval.labels.tolist() == [1, 0]


def test_gray_and_colour_images_are_converted(tmp_path):
    mixed = {"image": [png(40, mode="L"), png(60)], "label": [0, 1]}
    folder = write(tmp_path, train=mixed, test=mixed)
    assert load(folder).train.images[:, :, 0, 0].tolist() == [[40, 40, 40], [60, 61, 62]]
    assert load(folder, num_channels=1).train.images[:, :, 0, 0].tolist() == [[40], [61]]


def test_resize_keeps_the_proportions(tmp_path):
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, 10:30] = 200  # what a centre crop keeps
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    columns = {"image": [buffer.getvalue(), png(7)], "label": [0, 1]}
    loaded = load(write(tmp_path, train=columns, test=columns), image_size=10, resize=True)
    assert loaded.train.images.shape == (2, 3, 10, 10)
    assert (loaded.train.images[0, :, :, 2:-2] == 200).all()  # the filter reaches over the edge
    assert (loaded.train.images[0] > 150).all()


def test_given_mean_and_std_are_kept(tmp_path):
    folder = write(tmp_path, train=rows([0, 1]), test=rows([0, 1]))
    loaded = load(folder, mean=[0.1, 0.2, 0.3])
    assert loaded.mean == [0.1, 0.2, 0.3]
    np.testing.assert_allclose(loaded.std, [1 / 255] * 3)  # nearly constant channels: the floor
    with pytest.raises(ValueError, match="`data.mean` has 3 values for 1 channels"):
        load(folder, mean=[0.1, 0.2, 0.3], num_channels=1)
    with pytest.raises(ValueError, match="`num_channels` must be 1 or 3, got 4"):
        load(folder, num_channels=4)


@pytest.mark.parametrize(("train", "test"), [(None, None), (3, 2), (2, None), (100, 100)])
def test_only_the_prefix_is_decoded(tmp_path, monkeypatch, train, test):
    columns = rows([0, 1, 0, 1, 0])
    folder = write(tmp_path, train=columns, test=columns)
    opened = []
    monkeypatch.setattr(data_module, "BytesIO", lambda content: opened.append(content) or io.BytesIO(content))
    loaded = load(folder, max_train_samples=train, max_eval_samples=test)
    assert (len(loaded.train), len(loaded.eval)) == (min(train or 5, 5), min(test or 5, 5))
    assert sorted(opened) == sorted(columns["image"][: train or 5] + columns["image"][: test or 5])


def test_classes_come_from_the_whole_training_split(tmp_path):
    folder = write(tmp_path, train=rows([0, 1, 2, 3]), test=rows([3, 3]))
    assert load(folder, max_train_samples=2).id2label == {i: str(i) for i in range(4)}


def test_only_the_named_splits_are_read(tmp_path):
    folder = write(tmp_path, train=rows([0, 1]), test=rows([0, 1]))
    (folder / "huge.parquet").write_bytes(b"not parquet at all")
    assert len(load(folder).train) == 2


def test_name_is_ignored_with_a_warning(tmp_path):
    folder = write(tmp_path, train=rows([0, 1]), test=rows([0, 1]))
    with pytest.warns(UserWarning, match="`data.name` 'plain' is ignored"):
        load(folder, name="plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_loading_is_silent_and_leaves_the_verbosity(tmp_path, capfd):
    folder = write(tmp_path, train=rows([0, 1]), test=rows([0, 1]))
    datasets.logging.set_verbosity_warning()
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


# -------------------------------------------------------------------------------------------------------------- errors

GOOD = rows([0, 1])
EMPTY = {"image": np.array([], dtype=object), "label": np.array([], dtype=np.int64)}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"train": GOOD, "validation": GOOD}, {}, r"no split 'test'; choose from \['train', 'validation'\]"),
        (
            {"train": GOOD, "test": GOOD},
            {"train_split": "trian"},
            r"no split 'trian'; choose from \['test', 'train'\]",
        ),
        ({"train": EMPTY, "test": GOOD}, {}, "split 'train' is empty"),
        ({"train": GOOD, "test": EMPTY}, {}, "split 'test' is empty"),
        ({"train": {"x": ["a"], "label": [0]}, "test": GOOD}, {}, r"No image column .*\['x', 'label'\].*image_column"),
        ({"train": GOOD, "test": {"image": [png(0)], "y": [0]}}, {}, r"No label column .*\['image', 'y'\].*label_col"),
        (
            {"train": GOOD, "test": GOOD},
            {"image_column": "z"},
            r"`data.image_column`: no column 'z'; .*'image', 'label'",
        ),
        (
            {"train": GOOD, "test": GOOD},
            {"label_column": "z"},
            r"`data.label_column`: no column 'z'; .*'image', 'label'",
        ),
        ({"train": rows([0, 0]), "test": GOOD}, {}, r"only one class \('0'\): a classifier needs at least two"),
        ({"train": rows(["cat", "cat"]), "test": rows(["cat"])}, {}, r"has only one class \('cat'\): a classifier"),
        (
            {"train": rows([1, 1, 0]), "test": GOOD},
            {"max_train_samples": 2},
            r"\('1'\) in its first 2 training images",
        ),
        ({"train": rows([1, 2]), "test": GOOD}, {}, r"must be 0\.\.1 for 2 classes, got 1\.\.2"),
        ({"train": rows([0, 3]), "test": GOOD}, {}, r"must be 0\.\.1 for 2 classes, got 0\.\.3"),
        ({"train": rows([0.5, 1.0]), "test": GOOD}, {}, "whole numbers or strings, got 0.5"),
        ({"train": rows([0, None]), "test": GOOD}, {}, "whole numbers or strings, got None"),
        ({"train": GOOD, "test": rows([0, 2])}, {}, "Split 'test' has the label 2, which is none of the 2 classes"),
        ({"train": GOOD, "test": rows([-1])}, {}, "Split 'test' has the label -1"),
        ({"train": rows(["a", "b"]), "test": rows(["c"])}, {}, "Split 'test' has the label 'c'"),
        ({"train": {"image": [1, 2], "label": [0, 1]}, "test": GOOD}, {}, "'image' holds no images but .*int64"),
        (
            {"train": GOOD, "test": {"image": [png(0), None], "label": [0, 1]}},
            {},
            "Image 1 of split 'test' of .* missing",
        ),
        (
            {"train": GOOD, "test": {"image": [b"?"], "label": [0]}},
            {},
            "Image 0 of split 'test' of .* cannot be decoded",
        ),
        (
            {"train": GOOD, "test": {"image": [png(0), png(0, (5, SIZE))], "label": [0, 1]}},
            {},
            f"Image 1 of split 'test' of .* is 5x{SIZE}, the model takes {SIZE}x{SIZE}; `data.resize=true`",
        ),
    ],
)
def test_data_errors(tmp_path, files, settings, message):
    folder = write(tmp_path / "some set", **files)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)


def test_class_names_without_the_label(tmp_path):
    with_names(tmp_path, "train", ["ant", "bee"], [0, 1])
    with_names(tmp_path, "test", ["ant", "wasp"], [0, 1])
    with pytest.raises(ValueError, match="Split 'test' has the label 'wasp'"):
        load(tmp_path)
    with_names(tmp_path, "test", ["ant", "bee"], [0, -1])
    with pytest.raises(ValueError, match="Split 'test' has the label -1"):
        load(tmp_path)


def test_image_folder_of_one_class(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"only one class \('cat'\)"):
        load(tmp_path)


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "~/surely/nothing", "data/sets/nothing"])
def test_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=f"`data.path`: '{path}' is not an existing folder"):
        load(path)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match="neither parquet files .* nor images"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not an existing folder"):
        load(tmp_path / "notes" / "readme.txt")


def test_broken_parquet_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"not parquet at all, really")
    write(tmp_path, test=GOOD)
    with pytest.raises(ValueError, match="Cannot read the parquet data"):
        load(tmp_path)


def test_shards_that_disagree(tmp_path):
    folder = write(tmp_path, **{"train-0": GOOD, "train-1": {"image": [png(0)], "other": [1]}, "test": GOOD})
    with pytest.raises(ValueError, match="Cannot read the parquet data .*column names don't match") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hub could not be reached .*'somebody/pictures'.*`data.path=` takes a local"):
        load("somebody/pictures")


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(path, name):
        asked.append((path, name))
        parts = {split: datasets.Dataset.from_dict(rows([0, 1, 1])) for split in ("train", "test", "extra")}
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("somebody/pictures", name="small", eval_split="extra").eval.labels.tolist() == [0, 1, 1]
    assert asked == [("somebody/pictures", "small")]
    with pytest.raises(ValueError, match=r"no split 'dev'; choose from \['extra', 'test', 'train'\]"):
        load("somebody/pictures", eval_split="dev")


def test_hub_errors_keep_their_reason(monkeypatch):
    def load_dataset(path, name):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"Cannot load 'pictures' from the hub: Config .* missing. Please .*\['a', 'b'\]"
    ):
        load("pictures")
