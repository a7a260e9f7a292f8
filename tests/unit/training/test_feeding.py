"""Batches: which samples, in which order, wherever training stands, and however many processes share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from narrowcast.data.dataset import Dataset, split
from narrowcast.errors import ConfigError, DataError, TrainingError
from narrowcast.training.config import Augment, Data, Network
from narrowcast.training.distributed import Ranks
from narrowcast.training.feeding import Feeder, augmented, in_order, parts_of
from narrowcast.training.networks import inputs_of, trainable

SIZE = 37


@pytest.fixture
def images(dataset_of: Callable[..., Dataset]) -> Dataset:
    """Images whose numbers say which sample they are."""
    pixels = np.arange(SIZE, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 4, 4), np.float32)
    return dataset_of(labels=np.arange(SIZE, dtype=np.int64), image=pixels)


def feeder_of(data: Dataset, *, size: int = 8, rank: int = 0, world: int = 1, augment: Augment | None = None) -> Feeder:
    ranks = Ranks(rank, world)
    return Feeder(data, ["image"], "labels", size=size, seed=3, augment=augment or Augment(), ranks=ranks)


def test_an_epoch_holds_each_sample_once_and_the_next_one_another_order(images: Dataset) -> None:
    feeder = feeder_of(images, size=SIZE)
    first, second = feeder.indices(0), feeder.indices(1)
    assert sorted(first) == sorted(second) == list(range(SIZE))
    assert list(first) != list(second)


def test_any_batch_is_the_same_wherever_one_begins(images: Dataset) -> None:
    feeder = feeder_of(images, augment=Augment(shift=1, flip=True, noise=0.1))
    through = [(batch.samples.tolist(), batch.inputs) for batch in feeder.batches(0, 11)]
    again = feeder_of(images, augment=Augment(shift=1, flip=True, noise=0.1))
    for number, batch in enumerate(again.batches(7, 11), start=7):
        assert batch.samples.tolist() == through[number][0]
        assert torch.equal(torch.as_tensor(batch.inputs), torch.as_tensor(through[number][1]))


def test_samples_labels_and_indices_belong_together(images: Dataset) -> None:
    for batch in feeder_of(images).batches(0, 6):
        assert isinstance(batch.inputs, torch.Tensor)
        assert batch.inputs[:, 0, 0, 0].tolist() == batch.targets.tolist() == batch.samples.tolist()


def test_processes_share_a_batch_as_one_would_have_it(images: Dataset) -> None:
    augment = Augment(shift=1, flip=True, noise=0.5)
    whole = feeder_of(images, augment=augment).batch(5)
    shares = [feeder_of(images, rank=rank, world=2, augment=augment).batch(5) for rank in range(2)]
    assert torch.equal(torch.cat([share.inputs for share in shares]), whole.inputs)
    assert torch.equal(torch.cat([share.targets for share in shares]), whole.targets)


def test_batches_without_end_go_through_epochs(images: Dataset) -> None:
    feeder = feeder_of(images, size=20)
    batches = feeder.batches(0, None)
    assert [next(batches).samples.tolist() for _ in range(3)] == [feeder.indices(n).tolist() for n in range(3)]
    batches.close()


def test_all_samples_come_in_order_where_they_are_scored(images: Dataset) -> None:
    batches = list(in_order(images, ["image"], "labels", size=10, device=torch.device("cpu")))
    assert [len(batch.targets) for batch in batches] == [10, 10, 10, 7]
    assert torch.cat([batch.targets for batch in batches]).tolist() == list(range(SIZE))


def test_a_shift_moves_whole_pixels_and_leaves_zeros() -> None:
    images = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    shifted = {
        augmented(images, Augment(shift=1), np.random.default_rng(seed), 1, slice(0, 1)).tobytes() for seed in range(60)
    }
    assert len(shifted) == 9  # 3 x 3 shifts
    for found in shifted:
        moved = np.frombuffer(found, np.float32).reshape(3, 3)
        inside = moved[moved > 0]
        assert len(inside) in (4, 6, 9)
        assert np.isin(inside, images).all()


def test_flips_mirror_about_half_of_the_images() -> None:
    images = np.tile(np.arange(4, dtype=np.float32), (200, 1, 2, 1))
    flipped = augmented(images, Augment(flip=True), np.random.default_rng(0), 200, slice(0, 200))
    mirrored = (flipped == images[..., ::-1]).all((1, 2, 3))
    assert 70 < mirrored.sum() < 130
    assert (flipped[~mirrored] == images[~mirrored]).all()


def test_a_batch_must_fit_the_data_and_the_processes(images: Dataset) -> None:
    with pytest.raises(ConfigError, match="batch = 64") as caught:
        feeder_of(images, size=64)
    assert caught.value.allowed == f"1 to {SIZE}"
    with pytest.raises(ConfigError, match="9 for 2 processes") as caught:
        feeder_of(images, size=9, world=2)
    assert caught.value.next_step == "--set batch=8"


def test_data_that_end_early_are_named_with_the_place(images: Dataset) -> None:
    short = replace(images, load=lambda wanted: images.load(wanted[wanted < 30]))
    with pytest.raises(TrainingError, match="ends early") as caught:
        list(feeder_of(short).batches(0, 4))
    assert "of 8 samples of 'image'" in caught.value.what
    assert "--resume" in caught.value.next_step


def test_data_that_fail_are_named_with_the_reason(images: Dataset) -> None:
    def load(wanted: np.ndarray) -> dict[str, np.ndarray]:
        raise OSError("truncated picture")

    with pytest.raises(TrainingError, match="batch 0: OSError: truncated picture"):
        feeder_of(replace(images, load=load)).batch(0)


def test_augmentation_is_for_images(dataset_of: Callable[..., Dataset]) -> None:
    data = dataset_of(labels=np.zeros(9, np.int64), image=np.zeros((9, 5), np.float32))
    with pytest.raises(ConfigError, match=r"data\.augment"):
        feeder_of(data, augment=Augment(shift=1))


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_model() -> object:
    made, architecture = trainable(Network(name="bundled:digits-cnn"), seed=0)
    return inputs_of(made, architecture.name)


def test_one_reference_is_split_as_optimize_splits_it(digits_model: object) -> None:
    parts = parts_of(Data(train="bundled:digits", split_seed=4), digits_model)
    whole = parts_of(Data(train="bundled:digits-train", report="bundled:digits"), digits_model).report
    expected = split(whole, 4)
    for part, same in zip(parts, expected.__dict__.values(), strict=True):
        assert part is not None
        assert part.labels.tolist() == same.labels.tolist()


def test_a_report_part_of_its_own_leaves_all_of_the_other_to_train_on(digits_model: object) -> None:
    parts = parts_of(Data(train="bundled:digits-train", report="bundled:digits"), digits_model)
    assert (parts.train.size, parts.validation, parts.report.size) == (898, None, 899)


@pytest.mark.parametrize("role", ["report", "validation"])
def test_what_is_trained_on_is_not_reported(role: str, digits_model: object) -> None:
    settings = {"train": "bundled:digits", "report": "bundled:digits-train", role: "bundled:digits"}
    with pytest.raises(DataError, match="trained on as well"):
        parts_of(Data(**settings), digits_model)


def test_data_without_labels_are_refused(tmp_path: object, digits_model: object) -> None:
    np.savez("plain.npz", image=np.zeros((9, 1, 8, 8), np.float32))
    with pytest.raises(DataError, match="has no labels"):
        parts_of(Data(train="npz:plain.npz"), digits_model)
    with pytest.raises(DataError, match="has no array 'imagee'") as caught:
        parts_of(Data(train="npz:plain.npz", targets="imagee"), digits_model)
    assert "did you mean image?" in caught.value.allowed
    assert parts_of(Data(train="npz:plain.npz", targets="image"), digits_model).train.size == 4
