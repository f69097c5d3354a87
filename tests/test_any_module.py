"""From Python any module works as it is: several inputs, shared and frozen parts, layers that never run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autoprune.core.choices import NM, Block, Choice, Dense, Fine
from autoprune.core.errors import ModelError, PolicyError
from autoprune.kernels.convert import NestedModel, convert
from autoprune.kernels.modules import ProgramLayer
from autoprune.lut.deploy import masked_copy
from autoprune.search_spaces.space import load_space
from autoprune.search_spaces.trace import trace, trace_report
from autoprune.search_spaces.uniform import uniform_policy


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _same(got: Tensor, want: Tensor) -> None:
    want = want.detach()
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-4 * float(want.abs().max()))


class TwoInputs(nn.Module):
    """An image and a vector, the second by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 32, 3, padding=1)
        self.vector = nn.Linear(20, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(self.image(x).mean([2, 3]) + self.vector(y))}


def test_several_inputs_are_a_tuple_or_a_dict() -> None:
    model = TwoInputs().eval()
    example = {"x": _draw(2, 3, 8, 8), "y": _draw(2, 20)}
    layers = trace(model, example)
    assert [layer.name for layer in layers] == ["image", "vector", "head"]
    choices: dict[str, Choice] = {"image": Block(keep=0.5), "vector": Fine(keep=0.3)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, example)
    assert isinstance(deployed, NestedModel)
    _same(deployed(**example)["scores"], masked(**example)["scores"])
    assert len(deployed.time_us(2)) == 2

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            scores: Tensor = self.inner(x=x, y=y)["scores"]
            return scores

    pair = tuple(example.values())
    assert len(trace(Positional(), pair)) == 3
    with pytest.raises(ModelError, match=r"failed on an example of shape \(2, 3, 8, 8\).*missing 1 required"):
        trace(Positional(), example["x"])


class Shared(nn.Module):
    """One layer used twice, one weight in two layers, one shared with an embedding, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.twice = nn.Linear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.never = nn.Linear(16, 16)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.embedding(tokens))))
        out: Tensor = self.out(self.second(F.relu(self.first(x))))
        return out


def test_shared_weights_have_one_choice_and_are_counted_as_often_as_they_run() -> None:
    model = Shared().eval()
    tokens = torch.arange(12).reshape(2, 6)
    report = trace_report(model, tokens)
    assert [(layer.name, layer.calls) for layer in report.layers] == [("twice", 2), ("first", 2), ("out", 1)]
    assert report.tied == {"second": "first"}
    assert report.uncalled == ("never",)
    assert "embedding" in report.layers[-1].fixed
    assert report.notes() == [
        "not searched: out: its weight is also that of 'embedding' (Embedding)",
        "not searched: never: never called in a forward pass",
    ]
    space = load_space("mixed", report.layers)
    assert space.choices["out"] == (Dense(),)
    assert len(space.choices["first"]) > 1
    choices: dict[str, Choice] = {"twice": Block(keep=0.5), "first": NM(2, 4)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, tokens)
    _same(deployed(tokens), masked(tokens))
    kernels = {layer: kernel for layer, _, kernel, _ in deployed.explain()}
    assert kernels == {"twice": "block", "first": "csr", "second": "csr", "out": "dense"}


def test_frozen_parts_stay_dense_unless_all_is_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1)).eval()
    model[2].requires_grad_(False)
    layers = trace(model, _draw(1, 3, 8, 8))
    assert ["frozen" in layer.fixed for layer in layers] == [False, True, False]
    policy = uniform_policy(layers, ["block(keep=0.5)"], model="mine")
    assert policy.choices["2"] == Dense()
    assert policy.choices["3"] == Block(keep=0.5)
    model.requires_grad_(False)
    assert not any(layer.fixed for layer in trace(model, _draw(1, 3, 8, 8)))


class Standardised(nn.Conv2d):
    """Computes with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


class Plain(nn.Conv2d):
    """A forward of its own that does what any convolution does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def test_layers_that_compute_their_weights_stay_dense_by_name() -> None:
    model = nn.Sequential(
        Standardised(3, 16, 3, padding=1), Plain(16, 16, 1), parametrizations.weight_norm(nn.Conv2d(16, 16, 1))
    ).eval()
    x = _draw(1, 3, 6, 6)
    fixed = {layer.name: layer.fixed for layer in trace(model, x)}
    assert "Standardised has a forward of its own" in fixed["0"]
    assert fixed["1"] == ""
    assert "parametrization" in fixed["2"]
    choices: dict[str, Choice] = {"1": Block(keep=0.5)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, x)
    _same(deployed(x), masked(x))
    why = {layer: reason for layer, _, _, reason in deployed.explain()}
    assert why["0"] == "left to torch: Standardised has a forward of its own"


class TrainOnly(nn.Module):
    """A branch that runs only while it trains, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.aux = nn.Linear(16, 4)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x).mean([2, 3])
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def test_a_branch_that_only_trains_is_listed_and_may_be_named_by_a_policy() -> None:
    model = TrainOnly().train()
    report = trace_report(model, _draw(1, 3, 8, 8))
    assert report.uncalled == ("aux",)
    assert model.training
    choices: dict[str, Choice] = {"stem": Block(keep=0.5)}
    deployed = convert(masked_copy(model, choices), choices, _draw(1, 3, 8, 8))
    assert [layer for layer, *_ in deployed.explain()] == ["stem", "fc"]


class Foreign(nn.Module):
    """Layers of kinds that no kernel has."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x)).flatten(2)[:, :4]
        out: Tensor = self.line(x)
        return out


def test_layers_of_other_kinds_are_left_dense_by_name() -> None:
    model, x = Foreign().eval(), _draw(1, 3, 6, 6)
    assert "transposed" in " ".join(trace_report(model, x).notes())
    choices: dict[str, Choice] = {"conv": Block(keep=0.5)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, x)
    _same(deployed(x), masked(x))
    rows = {layer: (kernel, why) for layer, _, kernel, why in deployed.explain()}
    assert rows["conv"][0] == "block"
    assert rows["up"] == ("torch", "left to torch: a transposed convolution")
    assert rows["line"] == ("torch", "left to torch: a convolution in one dimension")
    with pytest.raises(PolicyError, match="layer 'up' is a transposed convolution and stays dense"):
        convert(masked, {"up": Fine(keep=0.5)}, x)


_CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "1x1": lambda: nn.Conv2d(16, 32, 1, bias=False),
    "1x1-strided": lambda: nn.Conv2d(16, 32, 1, stride=2),
    "3x3-dilated": lambda: nn.Conv2d(16, 32, 3, padding=2, dilation=2),
    "5x5-strided": lambda: nn.Conv2d(16, 33, 5, stride=(2, 1), padding=2),
    "7x7": lambda: nn.Conv2d(16, 20, 7, stride=2, padding=3),
    "1x7": lambda: nn.Conv2d(16, 20, (1, 7), padding=(0, 3)),
    "same": lambda: nn.Conv2d(16, 32, 3, padding="same"),
    "same-even": lambda: nn.Conv2d(16, 32, (4, 2), padding="same"),
    "valid": lambda: nn.Conv2d(16, 32, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(16, 32, (3, 5), stride=2, padding=(1, 2), padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="replicate"),
}


@pytest.mark.parametrize("choice", [Block(keep=0.3), Fine(keep=0.2)], ids=lambda choice: choice.text)
@pytest.mark.parametrize("kind", _CONVS)
def test_every_kind_of_convolution_runs_sparse_alone_and_inside_a_network(kind: str, choice: Choice) -> None:
    conv = _CONVS[kind]()
    # GELU has no rule in a plan: the network keeps its own code, and each layer becomes a module.
    for model in (nn.Sequential(conv), nn.Sequential(conv, nn.GELU())):
        choices: dict[str, Choice] = {"0": choice}
        masked = masked_copy(model.eval(), choices)
        deployed = convert(masked, choices, _draw(2, 16, 11, 9))
        assert deployed.explain()[0][2] == choice.kernel
        for shape in ((2, 16, 11, 9), (1, 16, 11, 9)):
            _same(deployed(_draw(*shape)), masked(_draw(*shape)))
    if isinstance(deployed, NestedModel):
        layer = deployed.network.get_submodule("0")
        assert isinstance(layer, ProgramLayer)
        _same(layer(_draw(16, 12, 10)), masked[0](_draw(16, 12, 10)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU], ids=["plan", "nested"])
def test_torch_compile_takes_a_converted_network_in_one_piece(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), act(), nn.Conv2d(16, 32, 3, stride=2), act(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 7),
    ).eval()
    choices: dict[str, Choice] = {"2": Block(keep=0.4), "6": Fine(keep=0.5)}
    masked = masked_copy(model, choices)
    deployed = convert(masked, choices, _draw(2, 3, 9, 9))
    torch._dynamo.reset()
    compiled = torch.compile(deployed, fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 9, 9), (3, 3, 9, 9)):
        _same(compiled(_draw(*shape)), masked(_draw(*shape)))
    other = copy.deepcopy(deployed)
    state = {name: 2.0 * tensor for name, tensor in other.state_dict().items()}
    other.load_state_dict(state)
    x = _draw(2, 3, 9, 9)
    twice = torch.compile(other, fullgraph=True, backend="aot_eager")(x)
    assert not torch.allclose(twice, compiled(x))
    _same(twice, other(x))
