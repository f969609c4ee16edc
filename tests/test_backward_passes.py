"""Which backward passes count, and over how many terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Checkpointed, preconditioner
from plain_kfac import assert_solved
from torch import Tensor, nn

from kfac_fast import KFAC, capture

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What PyTorch's own compiler does, and hides outside of tests.
    pytest.mark.filterwarnings("default:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("default:The .grad attribute"),
]
BATCH = 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def critic() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4, dtype=torch.float64), torch.randint(3, (BATCH,))


def gradient_covariances(kfac: KFAC) -> dict[str, Tensor]:
    return {block.layer.name: block.factors[-1].mean for block in kfac._blocks if block.factors}


def assert_equal_covariances(kfac: KFAC, other: KFAC) -> None:
    expected = gradient_covariances(other)
    assert gradient_covariances(kfac).keys() == expected.keys()
    for name, covariance in gradient_covariances(kfac).items():
        assert_solved(covariance, expected[name])


def train(model: nn.Module, kfac: KFAC, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    outputs = model(x)
    kfac.update_curvature(outputs, loss="cross_entropy")
    F.cross_entropy(outputs, y).backward()
    kfac.step()


def of_frozen(model: nn.Module, x: Tensor) -> None:
    """The generator's step of an adversarial pair."""
    model.requires_grad_(False)
    generator = nn.Linear(4, 4).double()
    (100 * model(generator(x)).square().mean()).backward()
    model.requires_grad_(True)


def of_the_input(model: nn.Module, x: Tensor) -> None:
    """An attack, a saliency map."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(100 * model(x).square().mean(), x)


def into_the_input(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (100 * model(x).square().mean()).backward(inputs=[x])


def of_the_weights(model: nn.Module, x: Tensor) -> None:
    """What adds to no gradient."""
    torch.autograd.grad(100 * model(x).square().mean(), list(model.parameters()))


def jacobian(model: nn.Module, x: Tensor) -> None:
    torch.autograd.functional.jacobian(model, x)


def batched(model: nn.Module, x: Tensor) -> None:
    outputs = model(x[:1])
    torch.autograd.grad(
        outputs, list(model.parameters()), torch.eye(3)[:, None].double(), is_grads_batched=True
    )


def of_each_example(model: nn.Module, x: Tensor) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def of_other_weights(model: nn.Module, x: Tensor) -> None:
    """Whose gradients are their own."""
    for kind in (Tensor.clone, nn.Parameter):
        weights = {name: kind(p.detach()).requires_grad_() for name, p in model.named_parameters()}
        (100 * torch.func.functional_call(model, weights, (x,)).square().mean()).backward()


OTHERS = (
    of_frozen,
    of_the_input,
    into_the_input,
    of_the_weights,
    jacobian,
    batched,
    of_each_example,
    of_other_weights,
)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_a_pass_that_adds_to_no_weights_gradient_does_not_count(
    other: Callable[[nn.Module, Tensor], None], fisher: str
) -> None:
    model, (x, y) = critic(), batch()
    results = []
    for disturbed in (False, True):
        with preconditioner(model, fisher=fisher) as kfac:
            torch.manual_seed(1)
            if disturbed:
                state = torch.get_rng_state()
                other(model, x)
                torch.set_rng_state(state)
            train(model, kfac, x, y)
            results.append(kfac)
    assert_equal_covariances(*results)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_a_pass_with_weights_that_are_computed_from_the_models_own_counts(fisher: str) -> None:
    model, (x, y) = critic(), batch()
    results = []
    for computed in (False, True):
        with preconditioner(model, fisher=fisher) as kfac:
            torch.manual_seed(1)
            weights = {name: 1 * p if computed else p for name, p in model.named_parameters()}
            model.zero_grad()
            outputs = torch.func.functional_call(model, weights, (x,))
            kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, y).backward()
            kfac.step()
            results.append(kfac)
    assert len(gradient_covariances(results[0])) == 2
    assert_equal_covariances(*results)


def test_a_frozen_layers_inputs_do_not_count_without_gradients() -> None:
    model, (x, _) = critic(), batch()
    with preconditioner(model, fisher="forward-only") as kfac:
        of_frozen(model, x)
        assert not any(block.pending for block in kfac._blocks)
        model(x)
        assert all(block.pending for block in kfac._blocks)


def test_a_pass_split_at_a_layers_output_counts_once() -> None:
    model, (x, y) = critic(), batch()
    results = []
    for split in (False, True):
        with preconditioner(model) as kfac:
            seen: list[Tensor] = []
            handle = model[0].register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            loss = F.cross_entropy(model(x), y)
            handle.remove()
            hidden = seen[0]
            if split:
                hidden.backward(*torch.autograd.grad(loss, hidden, retain_graph=True))
                loss.backward(inputs=list(model[2].parameters()))
            else:
                loss.backward()
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # undone below
def test_a_pass_that_is_differentiated_again_counts_once() -> None:
    """As for a diagonal of the Hessian."""
    model, (x, y) = critic(), batch()
    results = []
    for again in (False, True):
        with preconditioner(model) as kfac:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward(create_graph=again)
            if again:
                parameters = list(model.parameters())
                gradients = [p.grad for p in parameters]
                torch.autograd.grad(gradients, parameters, [torch.ones_like(g) for g in gradients])
                for parameter in parameters:
                    parameter.grad = parameter.grad.detach()
            kfac.step()
            results.append(kfac)
            assert not any(c.requires_grad for c in gradient_covariances(kfac).values())
    assert_equal_covariances(*results)


def test_an_earlier_hook_that_replaces_an_output_is_behind_the_layer() -> None:
    model, (x, y) = critic(), batch()
    results = []
    for before in (False, True):
        kfac = None if before else preconditioner(model)
        handle = model[0].register_forward_hook(lambda module, inputs, output: 10 * output)
        with kfac or preconditioner(model) as kfac:
            train(model, kfac, x, y)
            results.append(kfac)
        handle.remove()
    assert_equal_covariances(*results)


def test_inputs_of_another_layout_are_refused_by_name() -> None:
    model, (x, _) = critic(), batch()
    preconditioner(model)
    with pytest.raises(TypeError, match="inputs of '0' must be strided, got torch.sparse_coo"):
        model(x.to_sparse())


def test_autocast_around_the_step_changes_no_bit() -> None:
    """Neither of the step nor of what the curvature is formed of."""
    x, y = torch.randint(5, (BATCH, 4)), torch.randint(3, (BATCH,))
    options: list[dict[str, Any]] = [
        {"refinement_steps": 2, "inverse_update_steps": 2},
        {"fisher": "exact", "damping_mode": "exact", "eigenvalue_correction": True},
    ]
    for chosen in options:
        results = []
        for enabled in (False, True):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(24, 3))
            kfac = preconditioner(model, **chosen)
            for _ in range(2):
                model.zero_grad()
                outputs = model(x)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    kfac.update_curvature(outputs, loss="cross_entropy")
                F.cross_entropy(outputs, y).backward()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    kfac.step()
            results.append([p.grad for p in model.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# Terms


class Language(nn.Module):
    """Tokens with embedded positions, and an expert that sees a few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.shift = nn.Parameter(torch.randn(1, 3))
        self.common, self.expert, self.head = nn.Linear(3, 4), nn.Linear(3, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 3]`` of tokens ``[N, 5]``."""
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1])) + self.common(self.shift)
        rows = hidden.mean(1)
        logits = self.head(rows)
        return torch.cat([self.expert(logits[:3]), logits[3:]])


@pytest.mark.parametrize("compiled", [False, True])
def test_every_layer_has_the_number_of_terms_of_the_whole_batch(compiled: bool) -> None:
    model, x = Language(), torch.randint(7, (BATCH, 5))
    y = torch.randint(3, (BATCH,))
    results = []
    for counted in (False, True):
        with preconditioner(model) as kfac:
            run = torch.compile(model, backend="aot_eager") if compiled else model
            model.zero_grad()
            outputs = run(x)
            if counted:
                kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, y).backward()
            kfac.step()
            results.append(kfac)
        torch.compiler.reset()
    assert_equal_covariances(*results)


def test_an_input_without_a_batch_is_one_example() -> None:
    model = critic()
    results = []
    for shape in ((4,), (1, 4)):
        with preconditioner(model) as kfac:
            model(torch.arange(4.0, dtype=torch.float64).reshape(shape)).square().sum().backward()
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)


def test_the_batch_of_a_step_before_is_forgotten() -> None:
    """Later steps may go around the model's own forward pass."""
    model, (x, y) = critic(), batch()
    results = []
    for before in (False, True):
        with preconditioner(model, factor_decay=0) as kfac:
            model.zero_grad()
            if before:
                model(x[:1])
                kfac.step()
            F.cross_entropy(model[2](model[1](model[0](x))), y).backward()
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)


def test_terms_are_counted_before_a_recomputed_pass() -> None:
    """Of each micro-batch its own."""
    model, (x, y) = critic(), batch()
    results = []
    for recomputed in (False, True):
        with preconditioner(model, accumulation_steps=2) as kfac:
            for rows in (slice(0, 3), slice(3, BATCH)):
                inputs, targets = x[rows].clone().requires_grad_(), y[rows]
                outputs = (Checkpointed(model, use_reentrant=True) if recomputed else model)(inputs)
                kfac.update_curvature(outputs, loss="cross_entropy")
                (F.cross_entropy(outputs, targets) / 2).backward()
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_layers_out_of_reach_are_said_to_be(fisher: str) -> None:
    model, (x, _) = critic(), batch()
    kfac = preconditioner(model, fisher=fisher)
    outputs = Checkpointed(model, use_reentrant=True)(x.requires_grad_())
    kfac.update_curvature(outputs, loss="mse")
    outputs.square().mean().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=True.* hides them"):
        kfac.step()


@pytest.mark.parametrize(
    ("fisher", "compiled"),
    [("empirical", False), ("mc", False), ("exact", False), ("empirical", True), ("exact", True)],
)
def test_layers_may_be_frozen_for_the_first_steps(fisher: str, compiled: bool) -> None:
    """While the biases, or another part of the model, are trained."""
    model, (x, y) = critic(), batch()
    kfac = preconditioner(model, fisher=fisher)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    weights = [model[0].weight, model[2].weight]
    for frozen in (True, False):
        for weight in weights:
            weight.requires_grad_(not frozen)
        model.zero_grad()
        with torch._functorch.config.patch(donated_buffer=False):
            outputs = run(x)
            kfac.update_curvature(outputs, loss="cross_entropy")
            F.cross_entropy(outputs, y).backward()
        kfac.step()
        assert len(gradient_covariances(kfac)) == (0 if frozen else 2)
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact", "curvature-propagation"])
def test_outputs_of_a_pass_without_gradients_are_refused(fisher: str, compiled: bool) -> None:
    model, (x, _) = critic(), batch()
    kfac = preconditioner(model, fisher=fisher)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    with torch.no_grad():
        outputs = run(x)
    with pytest.raises(RuntimeError, match="^update_curvature: outputs must be those of a forward"):
        kfac.update_curvature(outputs, loss="cross_entropy")
    torch.compiler.reset()


def test_graphs_that_nobody_asks_for_are_warned_of() -> None:
    model, (x, _) = critic(), batch()
    preconditioner(model, fisher="mc")
    for _ in range(capture.MOST_WAITING + 1):
        model(x)
    with pytest.warns(RuntimeWarning, match="run other passes under torch.no_grad"):
        model(x)


def test_a_pass_that_is_recomputed_for_each_output_is_no_other_pass() -> None:
    outputs, (x, _) = capture.MOST_WAITING + 6, batch()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    results = []
    for run in (model, Checkpointed(model, use_reentrant=False)):
        with preconditioner(model, fisher="exact") as kfac:
            kfac.update_curvature(run(x), loss="cross_entropy")
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)


def test_a_recomputed_pass_leaves_the_count_of_terms_to_the_next_one() -> None:
    """The second micro-batch's, some of whose labels are ignored."""
    model, (x, y) = critic(), batch()
    y[4:8] = -100
    results = []
    for run in (model, Checkpointed(model, use_reentrant=False)):
        with preconditioner(model) as kfac:
            first, second = run(x[:4]), run(x[4:])
            F.cross_entropy(first, y[:4]).backward()
            kfac.update_curvature(second, loss="cross_entropy", targets=y[4:])
            F.cross_entropy(second, y[4:]).backward()
            kfac.step()
            results.append(kfac)
    assert_equal_covariances(*results)
