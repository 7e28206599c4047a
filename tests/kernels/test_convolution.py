"""Sparse convolutions: values and derivatives against torch, in and out of graphs and layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, jvp, vmap
from torch.nn import functional

import topkast_func as tk
from topkast_func.kernels import pattern_of
from topkast_func.kernels.convolution import sparse_convolution
from topkast_func.kernels.shifted import Convolution
from topkast_func.model import convolution as model_convolution

F64 = torch.float64
GEOMETRIES = {  # batch, channels, height, width, outputs, then of the convolution
    "same": ((5, 3, 9, 7, 4), Convolution((3, 3), (1, 1), (1, 1), (1, 1))),
    "strides": ((2, 4, 8, 8, 5), Convolution((3, 3), (2, 2), (1, 1), (1, 1))),
    "uneven": ((3, 2, 11, 6, 3), Convolution((5, 3), (2, 1), (2, 1), (1, 2))),
    "many small images": ((40, 2, 3, 3, 3), Convolution((3, 3), (1, 1), (0, 0), (1, 1))),
    "one axis": ((2, 3, 1, 50, 4), Convolution((1, 5), (1, 3), (0, 2), (1, 2))),
    "one tap": ((3, 4, 7, 7, 2), Convolution((1, 1), (2, 2), (0, 0), (1, 1))),
    "several strips": ((1, 2, 40, 40, 2), Convolution((7, 7), (3, 3), (3, 3), (1, 1))),
}
each_geometry = pytest.mark.parametrize("name", GEOMETRIES)


class Case:
    """A convolution at 60 / 30 % sparsity, beside the dense one at α."""

    def __init__(self, name: str, dtype: torch.dtype = F64) -> None:
        (batch, channels, height, width, outputs), self.layer = GEOMETRIES[name]
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(
            outputs, channels, *self.layer.kernel, dtype=dtype, generator=draw
        )
        self.x = torch.randn(batch, channels, height, width, dtype=dtype, generator=draw)
        sets = tk.compute_masks({"weight": self.weight}, tk.TopKastConfig(0.6, 0.3))["weight"]
        self.pattern, self.exploring = pattern_of(*sets), sets.backward & ~sets.forward
        self.places = self.pattern.flat_index((1, 1), self.weight.shape)
        self.values = self.gathered(self.weight)
        self.alpha = self.weight * sets.forward

    def gathered(self, weight: Tensor) -> Tensor:
        return weight.flatten()[self.places]

    def spread(self, values: Tensor) -> Tensor:
        flat = torch.zeros_like(self.weight).flatten().scatter(0, self.places, values)
        return flat.view_as(self.weight)

    def sparse(self, x: Tensor, values: Tensor) -> Tensor:
        outputs = self.weight.shape[0]
        y = sparse_convolution(x, values, self.pattern, outputs, self.layer, "numba")
        assert y is not None
        return y

    def dense(self, x: Tensor, alpha: Tensor) -> Tensor:
        _, stride, padding, dilation = self.layer
        return functional.conv2d(x, alpha, None, stride, padding, dilation)


@each_geometry
def test_a_convolution_in_bfloat16_is_one_in_float32_rounded_once(name: str) -> None:
    case = Case(name, torch.bfloat16)
    x, values = (t.clone().requires_grad_() for t in (case.x, case.values))
    of_x, alpha = (t.float().requires_grad_() for t in (case.x, case.alpha))
    y, expected = case.sparse(x, values), case.dense(of_x, alpha)
    g = torch.randn_like(y)
    for_x, for_values = torch.autograd.grad(y, (x, values), g)
    of_x, of_alpha = torch.autograd.grad(expected, (of_x, alpha), g.float())
    assert for_values.any()
    for found, full in ((y, expected), (for_x, of_x), (for_values, case.gathered(of_alpha))):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), full, rtol=2**-8, atol=1e-5)


@each_geometry
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_convolution_and_its_gradients_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    x, values, alpha = (t.clone().requires_grad_() for t in (case.x, case.values, case.alpha))
    y, expected = case.sparse(x, values), case.dense(x, alpha)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(expected)
    for_x, for_values = torch.autograd.grad(y, (x, values), g)
    of_x, of_alpha = torch.autograd.grad(expected, (x, alpha), g)
    assert of_alpha[case.exploring].all()
    torch.testing.assert_close(for_x, of_x)
    torch.testing.assert_close(for_values, case.gathered(of_alpha))


@each_geometry
def test_second_derivatives_and_forward_mode_are_those_of_torch(name: str) -> None:
    case = Case(name)
    along_x, along = torch.randn_like(case.x), torch.randn_like(case.values)

    def second(function: Callable[..., Tensor], weight: Tensor, along: Tensor) -> Any:
        x, weight = case.x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(x, weight)
        g = torch.ones_like(y).requires_grad_()
        firsts = torch.autograd.grad(y, (x, weight), g, create_graph=True)
        total = (firsts[0] * along_x).sum() + (firsts[1] * along).sum()
        return torch.autograd.grad(total, (x, weight, g))

    found = second(case.sparse, case.values, along)
    expected = second(case.dense, case.alpha, case.spread(along))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], case.gathered(expected[1]))
    torch.testing.assert_close(found[2], expected[2])
    moved = jvp(case.sparse, (case.x, case.values), (along_x, along))[1]
    moved_dense = jvp(case.dense, (case.x, case.alpha), (along_x, case.spread(along)))[1]
    torch.testing.assert_close(moved, moved_dense)


def test_vmap_batches_images_and_weights() -> None:
    case = Case("same")
    many, weights = torch.stack([case.x, -case.x]), torch.stack([case.values, 2 * case.values])
    y = case.sparse(case.x, case.values)
    by_image = vmap(partial(case.sparse, values=case.values))(many)
    torch.testing.assert_close(by_image, torch.stack([y, -y]))
    by_weight = vmap(partial(case.sparse, case.x))(weights)
    torch.testing.assert_close(by_weight, torch.stack([y, 2 * y]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["same", "strides"])
def test_compiled_gradients_equal_eager_ones(name: str, backend: str) -> None:
    torch.compiler.reset()
    case = Case(name)
    loss = grad_and_value(lambda x, values: case.sparse(x, values).square().sum(), argnums=(0, 1))
    expected, found = (
        run(case.x, case.values)
        for run in (loss, torch.compile(loss, fullgraph=True, backend=backend))
    )
    active = case.pattern.active_count
    assert expected[0][1][active:].all()
    torch.testing.assert_close(found, expected)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding="valid", bias=False),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(2),
        nn.Conv1d(4, 5, 3, padding="same"),
        nn.Flatten(),
        nn.Linear(5 * 9, 3),
    ).double()


def trained(model: nn.Module, storage: Any, **options: Any) -> dict[str, Tensor]:
    config = tk.TopKastConfig(0.8, 0.5, refresh_every=2, keep_dense=["7.*"])
    optimizer = tk.sgd(0.1, momentum=0.9)
    state = tk.init_state(model, config, optimizer, storage=storage)
    step = tk.make_train_step(
        model, lambda apply, x: apply(x).square().mean(), config, optimizer, **options
    )
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        state, _ = step(state, torch.randn(5, 3, 8, 8, dtype=F64, generator=draw))
    return tk.dense_params(state)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return network()


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> dict[str, Tensor]:
    return trained(model, "dense", compile=False)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "aot_eager"])
def test_training_on_the_kernels_is_that_of_masks(
    model: nn.Module,
    expected: dict[str, Tensor],
    compile: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = [False]  # of one length: what grew would have each step compiled anew

    def watched(*arguments: Any) -> Tensor | None:
        found = sparse_convolution(*arguments)
        assert found is not None
        seen[0] = True
        return found

    monkeypatch.setattr(model_convolution, "sparse_convolution", watched)
    found = trained(model, "compact", engine="numba", compile=compile)
    torch.testing.assert_close(found, expected)
    assert seen[0]


@pytest.mark.parametrize("engine", ["dense", "reference"])
def test_another_engine_leaves_convolutions_dense(
    model: nn.Module, expected: dict[str, Tensor], engine: Any
) -> None:
    torch.testing.assert_close(trained(model, "compact", engine=engine, compile=False), expected)


def test_what_no_kernel_computes_is_that_of_the_layer() -> None:
    fits = model_convolution.ConvolutionStandIn.fits
    assert all(map(fits, (nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 5, padding="same", dilation=2))))
    others = (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv3d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
    )
    assert not any(map(fits, others))


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)], ids=["no batch", "no images"])
def test_inputs_of_other_shapes_get_what_the_layer_returns(shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(3, 4, 3, dtype=F64)
    params = dict(layer.named_parameters())
    masks = tk.compute_masks(params, tk.TopKastConfig(0.5))
    sets = tk.index_masks(layer, masks)
    x = torch.randn(shape, dtype=F64)
    found, expected = (tk.sparse_forward(layer, params, given, x) for given in (sets, masks))
    torch.testing.assert_close(found, expected)


def test_a_wrong_number_of_channels_is_the_error_of_torch() -> None:
    layer = nn.Conv2d(3, 4, 3)
    params = dict(layer.named_parameters())
    sets = tk.index_masks(layer, tk.compute_masks(params, tk.TopKastConfig(0.5)))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        tk.sparse_forward(layer, params, sets, torch.randn(1, 2, 8, 8))


def test_blocks_of_kernels_stay_masks() -> None:
    layer = nn.Conv2d(4, 4, 3)
    params = dict(layer.named_parameters())
    config = tk.TopKastConfig(0.5, 0.25, block_shape=(2, 2))
    sets = tk.index_masks(layer, tk.compute_masks(params, config), (2, 2))
    assert isinstance(sets["weight"], tk.Masks)
    state = tk.init_state(layer, config, tk.sgd(0.1))
    assert tk.masks_of(state)["weight"].forward.sum() == layer.weight.numel() // 2
