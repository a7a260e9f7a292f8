"""FusedAdamW: the arithmetic of the reference, held to torch.optim.AdamW and to float64; state, skips and refusals."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from narrowcast.errors import TrainingError  # noqa: E402
from narrowcast.training import adamw_reference  # noqa: E402
from narrowcast.training.fused import FusedAdamW, adamw  # noqa: E402
from narrowcast.training.gradients import FusedUpdate  # noqa: E402

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))


def backward(model, seed, factor=1.0):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    (model(x).square().mean() * factor).backward()


def parameters_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_close(found, wanted, **bounds):
    for mine, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, its, **bounds)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_updates_are_those_of_torch(layout, clip_norm):
    mine, theirs = network(), network()
    if layout == "channels last":
        mine = mine.to(memory_format=torch.channels_last)
    ours, reference = FusedAdamW(mine.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    for seed in range(12):
        backward(mine, seed, 512.0)
        backward(theirs, seed)
        norm, finite = ours.update(1 / 512, clip_norm)
        bound = torch.inf if clip_norm is None else clip_norm
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), bound, error_if_nonfinite=True)
        reference.step()
        torch.testing.assert_close(norm, wanted)
        assert finite
        ours.zero_grad()
        reference.zero_grad()
    assert_close(mine.parameters(), theirs.parameters(), rtol=2e-5, atol=2e-6)


def test_the_arithmetic_against_float64():
    parameter = nn.Parameter(torch.linspace(-2, 2, 1000))
    optimizer = FusedAdamW([parameter], **SETTINGS)
    exact, first, second = parameter.detach().double().clone(), 0.0, 0.0
    for step in range(1, 6):
        gradient = torch.sin(exact * step)
        parameter.grad = gradient.float()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        exact = exact * (1 - 3e-4)
        exact = exact - 3e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), exact, rtol=1e-6, atol=1e-7)


def test_random_words_are_philox():
    """Against NumPy's generator of the same name, whose counter is raised before the first block."""
    seed, index, step = 123456789012345, 6, 9
    blocks = torch.arange(1, 40)
    words = torch.stack(adamw_reference._philox(seed, blocks, index, torch.tensor(step)), dim=1)
    for block, found in zip(blocks.tolist(), words.tolist(), strict=True):
        assert found == philox4x32([block, index, step, 0], [seed & 0xFFFFFFFF, seed >> 32])


def philox4x32(counter, key):
    """Return Philox4x32-10's block in Python's whole numbers."""
    for _ in range(10):
        one, two = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        mask = 0xFFFFFFFF
        counter = [(two >> 32) ^ counter[1] ^ key[0], two & mask, (one >> 32) ^ counter[3] ^ key[1], one & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def test_philox_gives_the_published_words():
    """The known answers that come with Random123: counter and key all zeros, and all ones."""
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox4x32([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_updates_below_the_resolution_of_bf16_count_unless_rounded_to_nearest(rounding):
    parameter = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = FusedAdamW([parameter], lr=1e-4, weight_decay=0.0, rounding=rounding)
    for _ in range(100):  # each moves a weight by 1e-4; below 1, BF16 has steps of 2**-8
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = 1 - parameter.detach().double().mean().item()
    if rounding == "nearest":
        assert moved == 0
    else:
        assert moved == pytest.approx(0.01, abs=0.002)


def test_stochastic_rounding_is_unbiased_and_repeats():
    values = torch.linspace(1, 1.01, 5).repeat_interleave(20_000)
    step = torch.tensor(7.0)
    rounded = adamw_reference._rounded(values, 0, step, 5)
    assert torch.equal(rounded, adamw_reference._rounded(values, 0, step, 5))
    for other in ((1, step, 5), (0, step + 1, 5), (0, step, 6)):
        assert not torch.equal(rounded, adamw_reference._rounded(values, *other))
    means = rounded.double().view(5, -1).mean(1)
    # A standard deviation of at most 2**-8 over 20,000 draws: five of them are 1.4e-4.
    np.testing.assert_allclose(means, values.view(5, -1)[:, 0], atol=1.4e-4)


def test_kahan_keeps_what_bf16_loses():
    values = torch.linspace(-3, 3, 777)
    parameter = nn.Parameter(values.bfloat16())
    optimizer = FusedAdamW([parameter], **SETTINGS, rounding="kahan")
    twin = nn.Parameter(parameter.detach().float())
    exact = FusedAdamW([twin], **SETTINGS)
    for step in range(200):
        gradient = torch.sin(values * step).bfloat16()
        parameter.grad, twin.grad = gradient, gradient.float()
        optimizer.step()
        exact.step()
    kept = parameter.detach().float() + optimizer.state[parameter]["compensation"].float()
    torch.testing.assert_close(kept, twin.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_nothing_changes_where_a_gradient_is_not_finite(broken):
    model = network()
    optimizer = FusedAdamW(model.parameters(), **SETTINGS)
    backward(model, 0)
    optimizer.update()
    before, state = parameters_of(model), copy.deepcopy(optimizer.state_dict())
    model[3].bias.grad[2] = broken
    norm, finite = optimizer.update(1.0, 1.0)
    assert not finite
    assert not norm.isfinite()
    assert_close(model.parameters(), before, rtol=0, atol=0)
    for mine, its in zip(optimizer.state_dict()["state"].values(), state["state"].values(), strict=True):
        assert_close(mine.values(), its.values(), rtol=0, atol=0)
    assert optimizer.state[model[0].weight]["step"] == 1
    optimizer.zero_grad()
    backward(model, 1)
    assert optimizer.update()[1]
    assert optimizer.state[model[0].weight]["step"] == 2


def test_the_scale_may_be_a_tensor_and_gradients_may_be_zeroed():
    model = network()
    optimizer = FusedAdamW(model.parameters(), zero_gradients=True)
    backward(model, 0, 64.0)
    kept = model[0].weight.grad
    norm, _ = optimizer.update(torch.tensor(1 / 64))
    assert kept is model[0].weight.grad
    assert not any(parameter.grad.count_nonzero() for parameter in model.parameters())
    model.zero_grad()
    twin = network()
    backward(twin, 0)
    torch.testing.assert_close(norm, nn.utils.get_total_norm([x.grad for x in twin.parameters()]))


def test_a_gradient_in_another_order_counts_element_by_element():
    first, second = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    first.grad, second.grad = gradient.T, gradient.T.contiguous()
    ours = FusedAdamW([first, second], lr=0.1, zero_gradients=True)
    ours.step()
    assert torch.equal(first, second)
    assert not first.grad.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_may_be_narrower_than_parameters(dtype):
    narrow, wide = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    gradient = torch.linspace(-1, 1, 50).to(dtype)
    narrow.grad_dtype = dtype
    narrow.grad, wide.grad = gradient, gradient.float()
    for one in (narrow, wide):
        FusedAdamW([one], **SETTINGS).step()
    assert torch.equal(narrow, wide)


def test_a_parameter_without_a_gradient_waits():
    model = network()
    optimizer = FusedAdamW(model.parameters(), **SETTINGS)
    for turn in range(3):
        backward(model, turn)
        if turn == 1:
            model[3].weight.grad = None
        optimizer.update()
        optimizer.zero_grad()
    assert optimizer.state[model[3].weight]["step"] == 2
    assert optimizer.state[model[3].bias]["step"] == 3


def resumed(model, optimizer, **choice):
    twin = copy.deepcopy(model)
    other = FusedAdamW(twin.parameters(), lr=1.0, **choice)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_with_the_same_bits(dtype, rounding):
    model = nn.Linear(30, 20).to(dtype)
    optimizer = FusedAdamW(model.parameters(), **SETTINGS, rounding=rounding, seed=3)

    def train(model, optimizer, rounds):
        for turn in rounds:
            for number, parameter in enumerate(model.parameters()):
                random = torch.Generator().manual_seed(10 * turn + number)
                parameter.grad = torch.randn(parameter.shape, generator=random).to(dtype)
            optimizer.update(1.0, 2.0)

    train(model, optimizer, range(4))
    twin, other = resumed(model, optimizer)
    for one, its in ((model, optimizer), (twin, other)):
        train(one, its, range(4, 8))
    assert_close(twin.parameters(), model.parameters(), rtol=0, atol=0)
    assert other.state[twin.weight]["exp_avg"].dtype is torch.float32


def test_state_goes_to_and_from_adamw_of_torch():
    mine, theirs = network(), network()
    ours, reference = FusedAdamW(mine.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    for seed in range(3):
        for model, optimizer in ((mine, ours), (theirs, reference)):
            model.zero_grad()
            backward(model, seed)
            optimizer.step()
    to_torch = torch.optim.AdamW(mine.parameters())
    to_torch.load_state_dict(ours.state_dict())
    from_torch = FusedAdamW(theirs.parameters())
    from_torch.load_state_dict(reference.state_dict())
    for model, optimizer in ((mine, to_torch), (theirs, from_torch)):
        assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"]
        model.zero_grad()
        backward(model, 3)
        optimizer.step()
    assert_close(mine.parameters(), theirs.parameters(), rtol=1e-5, atol=1e-6)


def test_saved_counters_share_no_memory():
    model = network()
    optimizer = FusedAdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    steps = [one["step"] for one in optimizer.state_dict()["state"].values()]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == len(steps)


def test_schedules_see_the_steps():
    model = network()
    optimizer = FusedAdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    backward(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.update()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    before = parameters_of(model)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.update()
    assert_close(model.parameters(), before, rtol=0, atol=0)


def test_groups_have_their_own_settings():
    decayed, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}], lr=0.1, weight_decay=0)
    decayed.grad, plain.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((3,), 0.95))
    assert torch.equal(plain, torch.ones(3))


def test_it_keeps_the_protocol_and_takes_closures():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([parameter])
    assert isinstance(optimizer, FusedUpdate)

    def closure():
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3


def test_on_the_cpu_the_choice_is_torchs_own():
    model = network()
    for params in (model.parameters(), model.named_parameters(), [{"params": list(model.parameters())}]):
        optimizer = adamw(params, **SETTINGS)
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["fused"] is True
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


def test_without_gradients_it_says_so():
    with pytest.raises(TrainingError, match="no parameter has a gradient"):
        FusedAdamW(network().parameters()).update()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": torch.tensor(0.1)}, "no tensor"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rounding": "stochastc"}, "did you mean stochastic"),
        ({"seed": -1}, "seed -1"),
    ],
    ids=["lr", "lr tensor", "betas", "eps", "decay", "rounding", "seed"],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(TrainingError, match=message):
        FusedAdamW([nn.Parameter(torch.ones(2))], **settings)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (lambda: torch.ones(2, dtype=torch.float16), "float16"),
        (lambda: torch.ones(2, dtype=torch.float64), "float64"),
        (lambda: torch.ones(4, 4)[:, :2], "strides"),
        (lambda: torch.ones(2).expand(3, 2), "strides"),
    ],
    ids=["fp16", "fp64", "gaps", "overlaps"],
)
def test_parameters_that_are_refused(parameter, message):
    with pytest.raises(TrainingError, match=message):
        FusedAdamW([nn.Parameter(parameter())])


def test_devices_and_sparse_gradients_and_other_states_are_refused():
    with pytest.raises(TrainingError, match="cpu, meta"):
        FusedAdamW([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))])
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError, match="sparse"):
        FusedAdamW(embedding.parameters()).step()
    parameter = nn.Parameter(torch.ones(2))
    for other in (torch.optim.AdamW([parameter], amsgrad=True), torch.optim.SGD([parameter], momentum=0.9)):
        parameter.grad = torch.ones(2)
        other.step()
        with pytest.raises(TrainingError, match=r"a state with amsgrad|an optimizer state without"):
            FusedAdamW([parameter]).load_state_dict(other.state_dict())


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,))))
        with pytest.raises(TrainingError, match="DTensor"):
            FusedAdamW([sharded])
        assert type(adamw([sharded])) is torch.optim.AdamW
    finally:
        torch.distributed.destroy_process_group()
