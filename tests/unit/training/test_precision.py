"""Policies by name: what they hold, what they refuse, what they do to a module."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from narrowcast.errors import DeviceError, FormatError
from narrowcast.training import DynamicScale, NoScale, StaticScale, Trainer, precision
from narrowcast.training.float8 import Float8
from narrowcast.training.overrides import format_of
from narrowcast.training.policies import POLICIES

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


class Recorder(nn.Module):
    """Passes its input on and remembers its dtype, and that of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.seen: list[torch.dtype] = []

    def forward(self, x):
        product = x @ self.weight
        self.seen += [x.dtype, product.dtype]
        return product


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test Card")


def test_each_policy_is_known_by_its_own_name():
    assert [precision(name).name for name in POLICIES] == list(POLICIES)
    assert set(POLICIES) == {"fp32", "tf32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp8-mixed"}


def test_only_fp16_scales_its_losses():
    assert {name for name in POLICIES if precision(name).scale.guards} == {"fp16-mixed"}


def test_names_are_read_as_people_write_them():
    assert precision(" BF16_Mixed ") == precision("bf16-mixed")


def test_fp16_true_is_refused_with_the_reason():
    with pytest.raises(FormatError, match="lose updates below 2\\^-11") as error:
        precision("fp16-true")
    assert "bf16-true" in error.value.next_step


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(FormatError, match="did you mean bf16-mixed"):
        precision("bf16-mix")


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ("dynamic", DynamicScale()),
        ("off", NoScale()),
        (1024, StaticScale(1024.0)),
        (DynamicScale(interval=5), DynamicScale(interval=5)),
    ],
    ids=["dynamic", "off", "number", "rule"],
)
def test_loss_scales_may_be_named_or_given(given, scale):
    assert precision("fp16-mixed", loss_scale=given).scale == scale


def test_an_unknown_loss_scale_is_refused():
    with pytest.raises(FormatError, match="loss scale 'static'"):
        precision("fp16-mixed", loss_scale="static")


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_an_update_of_bf16_weights_belongs_to_bf16_true(name):
    with pytest.raises(FormatError, match="kahan"):
        precision(name, update="kahan")


def test_fp8_settings_belong_to_fp8():
    with pytest.raises(FormatError, match="FP8 settings"):
        precision("bf16-mixed", float8=Float8())


def test_an_override_to_an_unknown_format_is_refused():
    with pytest.raises(FormatError, match="did you mean fp32"):
        precision("bf16-mixed", overrides={"head": "fp23"})
    with pytest.raises(FormatError, match="'fp8' in precision bf16-mixed"):
        precision("bf16-mixed", overrides={"head": "fp8"})


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
def test_the_cpu_computes_in_it(name):
    precision(name).check(CPU)


@pytest.mark.parametrize(("name", "instead"), [("tf32", "fp32"), ("fp8-mixed", "bf16-mixed")])
def test_the_cpu_lacks_it_and_the_error_says_what_to_use(name, instead):
    with pytest.raises(DeviceError, match=f"{name} on the CPU") as error:
        precision(name).check(CPU)
    assert instead in error.value.next_step


@pytest.mark.parametrize(
    ("name", "capability", "fits"),
    [
        ("tf32", (7, 5), False),
        ("tf32", (8, 0), True),
        ("bf16-mixed", (7, 5), False),
        ("bf16-true", (7, 5), False),
        ("bf16-mixed", (8, 0), True),
        ("fp16-mixed", (7, 0), True),
        ("fp8-mixed", (8, 6), False),
        ("fp8-mixed", (8, 9), True),
        ("fp8-mixed", (9, 0), True),
        ("fp8-mixed", (10, 0), True),
    ],
)
def test_cards_compute_in_it_from_a_capability_on(monkeypatch, name, capability, fits):
    card(monkeypatch, capability)
    if fits:
        precision(name).check(CUDA)
        return
    with pytest.raises(DeviceError, match=f"Test Card \\(capability {capability[0]}.{capability[1]}\\)"):
        precision(name).check(CUDA)


def test_other_devices_are_refused():
    with pytest.raises(DeviceError, match="meta"):
        precision("fp32").check(torch.device("meta"))


@pytest.mark.parametrize(
    ("name", "product"),
    [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)],
)
def test_mixed_policies_cast_products_and_keep_fp32_weights(name, product):
    policy, module = precision(name), Recorder()
    assert policy.prepare(module) is module
    with policy.autocast(CPU):
        assert module(torch.ones(2, 4)).dtype == product
    assert module.weight.dtype == torch.float32


def test_bf16_true_casts_weights_in_place_so_that_an_optimizer_goes_on_with_them():
    module = Recorder()
    weight = module.weight
    precision("bf16-true").prepare(module)
    assert module.weight is weight
    assert weight.dtype == torch.bfloat16


def network(**named: nn.Module) -> nn.Module:
    made = nn.Sequential()
    for name, module in named.items():
        made.add_module(name, module)
    return made


def test_an_override_keeps_a_module_in_fp32_under_autocast():
    model = network(body=Recorder(), head=Recorder())
    policy = precision("bf16-mixed", overrides={"head": "fp32"})
    policy.prepare(model)
    with policy.autocast(CPU):
        out = model(torch.ones(2, 4))
    assert model.body.seen == [torch.float32, torch.bfloat16]
    assert model.head.seen == [torch.float32, torch.float32]
    assert out.dtype == torch.float32


def test_an_override_casts_to_the_other_half_format():
    model = network(body=Recorder(), head=Recorder())
    policy = precision("fp16-mixed", overrides={"body": "bf16"})
    policy.prepare(model)
    with policy.autocast(CPU):
        model(torch.ones(2, 4))
    assert model.body.seen[1] == torch.bfloat16
    assert model.head.seen[1] == torch.float16


def test_an_override_of_bf16_weights_stores_and_computes_in_fp32_and_returns_bf16():
    model = network(body=Recorder(), head=Recorder())
    precision("bf16-true", overrides={"head": "fp32"}).prepare(model)
    out = model(torch.ones(2, 4, dtype=torch.bfloat16))
    assert model.head.weight.dtype == torch.float32
    assert model.body.weight.dtype == torch.bfloat16
    assert model.head.seen == [torch.float32, torch.float32]
    assert out.dtype == torch.bfloat16


def test_the_last_pattern_that_fits_counts_and_parts_follow_the_whole():
    overrides = (("*", "bf16"), ("block", "fp32"), ("block.inner", "fp16"))
    assert format_of("head", overrides) == "bf16"
    assert format_of("block.norm", overrides) == "fp32"
    assert format_of("block.inner.linear", overrides) == "fp16"
    assert format_of("head", (("block", "fp32"),)) is None


def test_an_inner_module_may_go_back_to_what_the_policy_computes_in():
    inner = network(first=Recorder(), second=Recorder())
    model = network(block=inner, head=Recorder())
    policy = precision("bf16-mixed", overrides={"block": "fp32", "block.second": "bf16"})
    policy.prepare(model)
    with policy.autocast(CPU):
        model(torch.ones(2, 4))
    assert [model.block.first.seen[1], model.block.second.seen[1], model.head.seen[1]] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]


def test_a_pattern_that_names_nothing_is_refused():
    with pytest.raises(FormatError, match="'haed\\*' names no module"):
        precision("bf16-mixed", overrides={"haed*": "fp32"}).prepare(network(body=Recorder(), head=Recorder()))


def test_a_module_with_an_override_copies_and_keeps_its_class_and_names():
    model = network(head=Recorder())
    names = list(model.state_dict())
    policy = precision("bf16-mixed", overrides={"head": "fp32"})
    policy.prepare(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.head.weight.fill_(3.0)
    with policy.autocast(CPU):
        assert float(copied(torch.ones(1, 4))[0, 0].detach()) == 12.0
        assert float(model(torch.ones(1, 4))[0, 0].detach()) == 4.0
    assert isinstance(model.head, Recorder)
    assert list(model.state_dict()) == names


def test_a_module_is_prepared_once():
    model = network(body=Recorder(), head=Recorder())
    policy = precision("bf16-mixed", overrides={"head": "fp32"})
    policy.prepare(model)
    kind = type(model.head)
    policy.prepare(model)
    precision("bf16-mixed", overrides={"head": "fp32"}).prepare(model)
    precision("bf16-mixed", loss_scale=8.0, overrides={"head": "fp32"}).prepare(model)
    assert type(model.head) is kind
    with pytest.raises(FormatError, match="prepared for precision bf16-mixed"):
        precision("fp32").prepare(model)


def test_what_is_compiled_is_cached_for_one_policy_alone():
    """Without the tag PyTorch 2.11 runs in FP16 what it compiled for BF16."""

    def tag_of(policy) -> str:
        seen = []

        def backend(graph, inputs):
            seen.append(torch.compiler.config.cache_key_tag)
            return graph.forward

        torch.compiler.reset()
        model = torch.compile(nn.Linear(4, 4), backend=backend)
        with policy.autocast(torch.device("cpu")):
            model(torch.ones(2, 4))
        return seen[0]

    policies = [precision(name) for name in ("fp32", "bf16-mixed", "fp16-mixed")]
    policies.append(precision("bf16-mixed", overrides={"head": "fp16"}))
    before = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag="mine"):
        tags = [tag_of(policy) for policy in policies]
    assert len(set(tags)) == 4
    assert all(tag.startswith("mine") for tag in tags)
    assert torch.compiler.config.cache_key_tag == before


def test_the_tag_of_a_cache_is_put_back_after_an_error_and_between_policies():
    tags = []

    def note() -> None:
        tags.append(torch.compiler.config.cache_key_tag)

    def fail() -> None:
        with precision("fp16-mixed").autocast(CPU):
            note()
            with suppress(KeyError), precision("bf16-mixed").autocast(CPU):  # a teacher within its student's loss
                note()
                raise KeyError
            note()
            raise ZeroDivisionError

    before = torch.compiler.config.cache_key_tag
    with pytest.raises(ZeroDivisionError):
        fail()
    assert tags[0] == tags[2]
    assert len({before, *tags}) == 3
    assert torch.compiler.config.cache_key_tag == before


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_a_compiled_function_may_enter_a_policy_itself(name):
    policy, layer = precision(name), nn.Linear(4, 4)
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def within(x):
        with policy.autocast(torch.device("cpu")):
            return layer(x)

    expected = {"fp32": torch.float32, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}[name]
    assert within(torch.ones(2, 4)).dtype == expected


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_a_step_compiles_nothing_anew(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = torch.compile(nn.Linear(4, 3), backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.functional.mse_loss, precision=name)
    for _ in range(4):
        trainer.step((torch.randn(2, 4), torch.randn(2, 3)))
    assert len(graphs) == 1


def test_tf32_holds_for_forward_and_backward_and_is_put_back(monkeypatch):
    card(monkeypatch, (9, 0))
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    with precision("tf32").running(CUDA):
        assert [place.allow_tf32 for place in places] == [True, True]
        with precision("fp32").running(CUDA):
            assert [place.allow_tf32 for place in places] == [False, False]
    assert [place.allow_tf32 for place in places] == before
