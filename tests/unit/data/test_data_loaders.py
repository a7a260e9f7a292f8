from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracts.graphs import Builder
from narrowcast.data.loaders import load_data, read_npz
from narrowcast.errors import DataError
from narrowcast.models.prepare import prepare
from narrowcast.models.reference import ImageSpec, Model, ModelRef

IMAGES = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
LABELS = np.arange(6)


def model_of(channels: int = 3, image: ImageSpec | None = None) -> Model:
    b = Builder(0)
    x = b.node("GlobalAveragePool", b.conv(b.input("image", channels, 8, 8), "a", (channels, 16), 3, 3), out="pooled")
    b.gemm(b.node("Flatten", x, out="flat"), "scores", 16, 6)
    model = b.model(scores=(6,))
    return Model(ModelRef("onnx", "net.onnx"), prepare(model, "net"), b"", "0", image=image)


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("key", ["labels", "label", "y"])
def test_arrays_and_labels_come_back_by_index(tmp_path: Path, key: str) -> None:
    data = load_data(save(tmp_path / "d.npz", image=IMAGES, **{key: LABELS}), model_of())
    assert data.size == 6
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()
    assert data.labels.dtype == np.int64
    np.testing.assert_array_equal(data.load(np.array([4, 1]))["image"], IMAGES[[4, 1]])


def test_a_bare_path_that_ends_in_npz_is_enough(tmp_path: Path) -> None:
    save(tmp_path / "d.npz", image=IMAGES)
    assert load_data(str(tmp_path / "d.npz"), model_of()).labels is None


def test_groups_of_any_type_become_numbers(tmp_path: Path) -> None:
    groups = np.array(["b", "a", "b", "c", "a", "a"])
    data = load_data(save(tmp_path / "d.npz", image=IMAGES, groups=groups), model_of())
    assert data.groups is not None
    assert data.groups.tolist() == [1, 0, 1, 2, 0, 0]


def test_the_hash_follows_the_values_and_the_labels(tmp_path: Path) -> None:
    def digest(**arrays: np.ndarray) -> str:
        return load_data(save(tmp_path / "d.npz", **arrays), model_of()).sha256

    first = digest(image=IMAGES, labels=LABELS)
    assert digest(image=IMAGES, labels=LABELS) == first
    assert digest(image=IMAGES + 1, labels=LABELS) != first
    assert digest(image=IMAGES, labels=LABELS[::-1]) != first
    assert digest(image=IMAGES) != first


def test_the_hash_follows_the_groups(tmp_path: Path) -> None:
    """Groups decide the split, and an unfinished run is resumed by this hash."""

    def digest(groups: list[int]) -> str:
        return load_data(save(tmp_path / "d.npz", image=IMAGES, groups=np.array(groups)), model_of()).sha256

    assert digest([0, 0, 1, 1, 2, 2]) != digest([0, 1, 2, 0, 1, 2])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.npz does not exist"):
        load_data(f"npz:{tmp_path / 'absent.npz'}", model_of())


@pytest.mark.parametrize("content", [b"", b"not a zip archive at all", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz cannot be read as an \.npz archive"):
        load_data(f"npz:{path}", model_of())


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "d.npz"
    save(path, image=IMAGES)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"d\.npz cannot be read"):
        load_data(f"npz:{path}", model_of())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_a_file_with_overwritten_bytes_is_named(tmp_path: Path, compressed: bool, byte: int) -> None:
    path = tmp_path / "d.npz"
    (np.savez_compressed if compressed else np.savez)(path, image=np.round(IMAGES))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 32] = bytes([byte]) * 32
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"d\.npz cannot be read"):
        load_data(f"npz:{path}", model_of())


def test_a_single_array_file_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"d\.npz cannot be read as an \.npz archive"):
        read_npz(path)


def test_python_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"(?i)d\.npz cannot be read.*(pickle|object)"):
        read_npz(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_data(f"npz:{tmp_path}", model_of())


def test_an_empty_archive_holds_no_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_data(save(tmp_path / "d.npz"), model_of())


def test_arrays_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        load_data(save(tmp_path / "d.npz", image=IMAGES[:0]), model_of())


def test_a_scalar_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_data(save(tmp_path / "d.npz", image=np.float32(3)), model_of())


def test_arrays_of_different_lengths_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"different numbers of samples.*image: 6.*labels: 5"):
        load_data(save(tmp_path / "d.npz", image=IMAGES, labels=LABELS[:5]), model_of())


def test_nan_anywhere_is_found(tmp_path: Path) -> None:
    spoiled = IMAGES.copy()
    spoiled[5, 2, 7, 7] = np.nan
    with pytest.raises(DataError, match=r"'image' holds nan at \[5, 2, 7, 7\]"):
        load_data(save(tmp_path / "d.npz", image=spoiled), model_of())


def test_an_array_by_another_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no array for the model's input 'image'.*'x'"):
        load_data(save(tmp_path / "d.npz", x=IMAGES), model_of())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(6) - 2, "label -2 (sample 0) is negative"),
        (np.arange(6) / 2, "float64"),
        (np.eye(6, dtype=np.int64), r"shape \[6, 6\]"),
        (np.array(list("abcdef")), "<U1"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match="label") as caught:
        load_data(save(tmp_path / "d.npz", image=IMAGES, labels=labels), model_of())
    assert message in caught.value.what.replace("\\", "") or message.replace("\\", "") in caught.value.what


def test_labels_in_one_column_are_class_indices(tmp_path: Path) -> None:
    data = load_data(save(tmp_path / "d.npz", image=IMAGES, labels=LABELS[:, None]), model_of())
    assert data.labels is not None
    assert data.labels.shape == (6,)


@pytest.mark.parametrize("reference", ["npz:", "nonsense", "np:data.npz", "imagefolder", ""])
def test_a_reference_to_no_source_lists_the_sources(reference: str) -> None:
    with pytest.raises(DataError, match="name no known source") as caught:
        load_data(reference, model_of())
    assert "imagefolder" in caught.value.allowed


def test_unknown_bundled_data_suggest_the_nearest() -> None:
    with pytest.raises(DataError, match="'digit'") as caught:
        load_data("bundled:digit", model_of())
    assert "did you mean digits" in caught.value.allowed


# Pictures -------------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / kind / f"{number}.png")


def test_folders_of_pictures_are_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "pets")
    data = load_data(f"imagefolder:{tmp_path / 'pets'}", model_of())
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    loaded = data.load(np.array([5, 0]))["image"]
    assert loaded.shape == (2, 3, 8, 8)
    assert loaded.dtype == np.float32


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    Image.new("L", (10, 10), 128).save(tmp_path / "a.png")
    data = load_data(f"imagefolder:{tmp_path}", model_of(1, ImageSpec((8, 8), (0.0,), (1.0,))))
    assert data.labels is None
    np.testing.assert_allclose(data.load(np.array([0]))["image"], 128 / 255, atol=1e-3)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_pictures_is_named(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "empty"
    if there:
        folder.mkdir()
    with pytest.raises(DataError, match="holds no pictures" if there else "does not exist"):
        load_data(f"imagefolder:{folder}", model_of())


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(buffer, "PNG")
    (tmp_path / "broken.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(DataError, match=r"broken\.png"):
        load_data(f"imagefolder:{tmp_path}", model_of())


# Functions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labelled"), [("by_name", False), ("with_labels", True), ("as_tuple", True), ("bare", False)]
)
def test_a_function_may_return_arrays_in_several_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, labelled: bool
) -> None:
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\n"
        "images, labels = np.ones((6, 3, 8, 8), np.float32), np.arange(6)\n"
        "def by_name(): return {'image': images}\n"
        "def with_labels(): return {'image': images, 'labels': labels}\n"
        "def as_tuple(): return {'image': images}, labels\n"
        "def bare(): return images\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_data", raising=False)
    data = load_data(f"py:my_data:{name}", model_of())
    assert (data.size, data.labels is not None) == (6, labelled)


def test_a_function_that_returns_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_data.py").write_text("def words(): return ['a', 'b']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="py:bad_data:words returned list"):
        load_data("py:bad_data:words", model_of())
    with pytest.raises(DataError, match="no function 'wards'") as caught:
        load_data("py:bad_data:wards", model_of())
    assert "did you mean words" in caught.value.allowed
    with pytest.raises(DataError, match="'no_such_module' cannot be imported"):
        load_data("py:no_such_module:words", model_of())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def broken(): raise RuntimeError('no disk')", "failing_data:broken failed with RuntimeError: no disk"),
        ("def broken(:", "failing_data:broken failed with SyntaxError"),
        ("nonsense", "failing_data:broken failed with NameError: name 'nonsense' is not defined"),
    ],
    ids=["function", "syntax", "module"],
)
def test_what_goes_wrong_in_the_users_code_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    (tmp_path / "failing_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "failing_data", raising=False)
    with pytest.raises(DataError) as caught:
        load_data("py:failing_data:broken", model_of())
    assert says in caught.value.what
    assert "--debug" in caught.value.next_step


def test_samples_of_the_users_own_dataset_are_checked_when_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_data.py").write_text(
        "import numpy as np\n"
        "from narrowcast import Dataset\n"
        "def load(indices):\n"
        "    if 8 in indices: raise OSError('disk gone')\n"
        "    return {'image': np.where(indices == 5, np.nan, 1).astype(np.float32)[:, None, None, None]\n"
        "            * np.ones((3, 8, 8), np.float32)}\n"
        "def lazy(): return Dataset('mine', '0' * 64, 9, load)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data("py:lazy_data:lazy", model_of())
    assert data.load(np.arange(4))["image"].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"samples 4 to 6: 'image' holds nan at \[1, 0, 0, 0\]"):
        data.load(np.arange(4, 7))
    with pytest.raises(DataError, match="data py:lazy_data:lazy failed with OSError: disk gone"):
        data.load(np.array([8]))
