from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import narrowcast.training.teacher_cache as module
from narrowcast.errors import OutputError, TrainingError
from narrowcast.training.distillation import Distillation
from narrowcast.training.teacher_cache import CachedData, TeacherCache, fingerprint, teacher_hash

SIZE = 50


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 16)


class Counting(nn.Module):
    """A network that counts the samples that it was asked about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(1, 3, 3), nn.Linear(108, 5)
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.last(self.first(x).relu().flatten(1))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(SIZE, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def data(images: Tensor, augmentation: str = "") -> CachedData:
    return CachedData("d" * 64, len(images), lambda index: images[index], augmentation)


def test_answers_come_back_by_sample_index_without_the_teacher(tmp_path: Path, images: Tensor):
    distillation = Distillation(Counting(), features=[("first", "first")])
    told: list[tuple[int, int]] = []
    cache = TeacherCache.fill(tmp_path, distillation, data(images), batch=7, note=lambda *at: told.append(at))
    assert told == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert distillation.teacher.asked == SIZE
    index = torch.tensor([49, 3, 3, 17, 0, 31])
    expected = distillation.teach(images[index])
    distillation.teacher.asked = 0
    distillation.cache = cache
    labels = torch.arange(6)
    _, taught = distillation.batch(images[index], labels, index)
    assert distillation.teacher.asked == 0
    assert taught.labels is labels
    torch.testing.assert_close(taught.logits, expected.logits)
    torch.testing.assert_close(taught.features[0], expected.features[0])


def test_a_second_run_asks_nothing_and_a_killed_one_is_continued(tmp_path: Path, images: Tensor):
    TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))
    again = Distillation(Counting())
    cache = TeacherCache.fill(tmp_path, again, data(images))
    assert again.teacher.asked == 0
    before = {file.name: file.read_bytes() for file in cache.folder.iterdir()}
    (cache.folder / "00001.safetensors").unlink()
    third = cache.folder / "00002.safetensors"
    third.write_bytes(third.read_bytes()[:100])  # what no atomic write leaves, but a full disk may
    after = Distillation(Counting())
    TeacherCache.fill(tmp_path, after, data(images))
    assert after.teacher.asked == 32
    assert {file.name: file.read_bytes() for file in cache.folder.iterdir()} == before


def test_a_killed_write_leaves_whole_files_alone(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch):
    calls = 0
    real = module.os.fsync

    def killed(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the third shard: the first write is cache.json
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(module.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["00000.safetensors", "00001.safetensors", "cache.json"]


def test_another_teacher_precision_feature_or_data_set_has_a_cache_of_its_own(tmp_path: Path, images: Tensor):
    folders = [
        TeacherCache.fill(tmp_path, Distillation(Counting(seed), precision=precision, features=features), found).folder
        for seed, precision, features, found in (
            (0, "fp32", (), data(images)),
            (1, "fp32", (), data(images)),
            (0, "bf16-mixed", (), data(images)),
            (0, "fp32", [("first", "first")], data(images)),
            (0, "fp32", (), CachedData("e" * 64, SIZE, lambda index: images[index])),
            (0, "fp32", (), data(images[:40])),
        )
    ]
    assert len(set(folders)) == len(folders)


def test_half_precision_outputs_stay_as_they_are(tmp_path: Path, images: Tensor):
    distillation = Distillation(Counting(), precision="bf16-mixed")
    cache = TeacherCache.fill(tmp_path, distillation, data(images), batch=16)
    index = torch.arange(16)
    found = cache.look_up(images[index], index).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, distillation.teach(images[index]).logits)


def test_augmented_data_are_refused(tmp_path: Path, images: Tensor):
    with pytest.raises(TrainingError, match="shift by up to 2 pixels"):
        TeacherCache.fill(tmp_path, Distillation(Counting()), data(images, "shift by up to 2 pixels"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [lambda x: x.roll(1, -1), lambda x: x.flip(-1), lambda x: x + 0.05 * torch.randn_like(x), lambda x: x.roll(1, 0)],
    ids=["shift", "mirror", "noise", "index"],
)
def test_inputs_that_the_teacher_was_not_asked_about_are_noticed(tmp_path: Path, images: Tensor, change):
    torch.manual_seed(0)
    cache = TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))
    index = torch.arange(8)
    with pytest.raises(TrainingError, match="is not what the teacher's cache holds"):
        cache.look_up(change(images[:8]), index)


def test_inputs_that_differ_by_rounding_are_the_same(tmp_path: Path, images: Tensor):
    cache = TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))
    cache.look_up(images[:8] * (1 + 1e-6), torch.arange(8))
    assert float((fingerprint(images) - fingerprint(images.half().float())).abs().max()) < 1e-3
    tokens = torch.randint(30_000, (4, 128))
    assert fingerprint({"ids": tokens, "mask": torch.ones_like(tokens)}).shape == (4,)


def test_indices_are_asked_for_and_checked(tmp_path: Path, images: Tensor):
    cache = TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))
    with pytest.raises(TrainingError, match="without sample indices"):
        cache.look_up(images[:2], None)
    with pytest.raises(TrainingError, match="0 to 49"):
        cache.look_up(images[:2], torch.tensor([0, 50]))


def test_an_answer_that_is_not_finite_is_refused(tmp_path: Path, images: Tensor):
    images[20, 0, 3, 3] = float("inf")
    with pytest.raises(TrainingError, match="logits of sample 20 are not finite"):
        TeacherCache.fill(tmp_path, Distillation(Counting()), data(images))


def test_a_folder_that_cannot_be_made_is_an_error_of_the_output(tmp_path: Path, images: Tensor):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        TeacherCache.fill(tmp_path / "file", Distillation(Counting()), data(images))


def test_the_hash_tells_networks_apart():
    first = teacher_hash(Counting())
    assert first == teacher_hash(Counting())
    assert first != teacher_hash(Counting(1))
    one, other = nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())
    assert teacher_hash(one) != teacher_hash(other)
    negative = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        negative.weight.fill_(0.0)
        positive = teacher_hash(negative)
        negative.weight.fill_(-0.0)
    assert teacher_hash(negative) != positive
