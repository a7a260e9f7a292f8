"""Configs: what they hold, their short forms, and how mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from narrowcast.errors import ConfigError
from narrowcast.training.config import Adam, AdamW, Config, Section, Sgd
from narrowcast.training.reading import (
    dump,
    fields_of,
    items_of,
    read_config,
    read_yaml,
    sections_of,
    validated,
    with_overrides,
)

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
LEAST: dict[str, Any] = {"network": "bundled:mnist-cnn", "data": "bundled:mnist5k", "epochs": 3}


def made(*overrides: str) -> Config:
    return validated(with_overrides(LEAST, overrides), "run.yaml")


def test_a_section_may_be_given_by_its_first_key_alone() -> None:
    whole = {"network": {"name": "bundled:mnist-cnn"}, "data": {"train": "bundled:mnist5k"}, "epochs": 3}
    assert made() == validated(whole, "run.yaml")
    assert made("checkpoint=7").checkpoint.every == 7
    assert made("precision=fp16-mixed").precision.name == "fp16-mixed"


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    config = made(
        "precision={name: fp16-mixed, loss_scale: {floor: 1, hysteresis: 2}, overrides: {'head': fp32}}",
        "optimizer={name: sgd, lr: 1e-2}",
        "tune.space={optimizer.lr: {low: 1e-4, high: 1e-1, log: true}, batch: [16, 32]}",
        "distill={teacher: runs/big, features: [{teacher: a, student: b}]}",
        "doctor=off",
    )
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(example: Path) -> None:
    assert read_config(example).network.name


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("adam", Adam), ("sgd", Sgd)])
def test_an_optimizer_is_chosen_by_name(name: str, kind: type) -> None:
    assert type(made(f"optimizer={name}").optimizer) is kind


@pytest.mark.parametrize(
    ("text", "kind", "initial"),
    [("dynamic", "dynamic", None), ("1024", "static", 1024.0), ("1e3", "static", 1000.0), ("off", "off", None)],
)
def test_a_loss_scale_is_a_word_or_a_number(text: str, kind: str, initial: float | None) -> None:
    scale = made(f"precision.loss_scale={text}").precision.loss_scale
    assert scale is not None
    assert (scale.kind, scale.initial) == (kind, initial)


def test_an_override_reaches_into_a_section_in_its_short_form() -> None:
    config = made("precision=fp16-mixed", "precision.loss_scale.floor=2", "data.augment.shift=1")
    assert config.precision.name == "fp16-mixed"
    assert config.precision.loss_scale is not None
    assert config.precision.loss_scale.floor == 2
    assert (config.data.train, config.data.augment.shift) == ("bundled:mnist5k", 1)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert made("optimizer.lr=3e-4").optimizer.lr == 3e-4
    assert made("optimizer.lr=1").optimizer.lr == 1


def test_off_is_what_yaml_calls_false() -> None:
    assert made("doctor=off").doctor == made("doctor='off'").doctor == "off"


def described(section: type[Section], path: str = "") -> Iterator[tuple[str, str | None]]:
    for key in fields_of(section):
        yield f"{path}{key}", section.model_fields[key].description
        for inner in (*sections_of(section, key), *items_of(section, key)):
            yield from described(inner, f"{path}{key}.")


def test_every_key_is_described() -> None:
    found = dict(described(Config))
    assert {
        "optimizer.momentum",
        "precision.loss_scale.hysteresis",
        "tune.space.low",
        "distill.features.weight",
    } <= set(found)
    assert all(text and text.endswith((".", "`.")) for text in found.values())


MISTAKES: dict[str, tuple[str, str, str]] = {
    "unknown key": ("precisoin=fp32", "'precisoin' is unknown", "did you mean precision?"),
    "unknown key below": ("optimizer.lrr=1", "'optimizer.lrr' is unknown", "did you mean optimizer.lr?"),
    "key of a section": ("tensorboard=true", "'tensorboard' is unknown", "did you mean log.tensorboard?"),
    "key of another section": ("data.lr=1", "'data.lr' is unknown", "did you mean optimizer.lr?"),
    "unknown key two below": ("data.augment.flp=true", "unknown", "did you mean data.augment.flip?"),
    "key of sections alike": ("teacher=t", "unknown", "did you mean distill.teacher?"),
    "text for a list": ("optimizer.betas=3", "optimizer.betas = 3", "optimizer.betas: a list"),
    "text for a feature": (
        "distill={teacher: t, features: [a]}",
        "distill.features.0 = 'a'",
        "distill.features.0: a section with teacher, student, weight",
    ),
    "text for a range": ("tune.space={batch: {low: 1, high: 2, log: 3}}", "tune.space.batch.log = 3", "true or false"),
    "key of another optimizer": (
        "optimizer={name: sgd, betas: [0.9, 0.99]}",
        "'optimizer.betas' is unknown",
        "momentum",
    ),
    "unknown optimizer": ("optimizer=adamx", "optimizer: no such optimizer", ""),
    "unknown key of a number": ("batch.size=3", "", "batch: a whole number"),
    "text for a number": ("batch=many", "batch = 'many'", "batch: a whole number"),
    "truth for a number": ("epochs=true", "epochs = True", "epochs: a whole number"),
    "fraction for a whole number": ("batch=1.5", "batch = 1.5", "batch: a whole number"),
    "not finite": ("optimizer.lr=.nan", "optimizer.lr = nan", "finite"),
    "too small": ("batch=0", "batch = 0", "greater than or equal to 1"),
    "not among the choices": ("ranks=shared", "ranks = 'shared'", "'replicated' or 'sharded'"),
    "null": ("network=null", "network = None", "a section with name, arguments, input"),
    "both lengths": ("steps=3", "give one of epochs and steps", ""),
    "validation without report": ("data.validation=npz:v.npz", "data.validation needs data.report", ""),
    "static scale that moves": (
        "precision.loss_scale={kind: static, initial: 2, cap: 4}",
        "cap belongs to dynamic",
        "",
    ),
    "a range without an end": ("tune.space={batch: {low: 1}}", "tune.space.batch: give low and high", ""),
    "a range upside down": ("tune.space={batch: {low: 3, high: 1}}", "low must be below high", ""),
    "unknown key of a range": (
        "tune.space={batch: {lo: 1}}",
        "'tune.space.batch.lo' is unknown",
        "did you mean tune.space.batch.low?",
    ),
    "a feature without a student": (
        "distill={teacher: t, features: [{teacher: a}]}",
        "'distill.features.0.student'",
        "",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(kind: str) -> None:
    override, what, allowed = MISTAKES[kind]
    with pytest.raises(ConfigError) as caught:
        made(override)
    assert what in caught.value.what
    assert allowed in caught.value.allowed


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validated({"network": "a", "data": "b", "batch": "x", "speed": 1, "seed": -1}, "run.yaml")
    assert "run.yaml has 3 mistakes" in caught.value.what
    for part in ("batch = 'x'", "key 'speed' is unknown", "seed = -1"):
        assert part in caught.value.what


@pytest.mark.parametrize("override", ["batch", "=3", "batch=["])
def test_an_override_that_is_none_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        made(override)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot be read"),
        ("a: [", "is no YAML"),
        ("- 1", "holds list"),
        ("!!python/object:os.system x", "is no YAML"),
    ],
)
def test_a_file_that_holds_no_config_is_named(tmp_path: Path, content: str | None, what: str) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=what) as caught:
        read_yaml(file)
    assert "run.yaml" in caught.value.what
