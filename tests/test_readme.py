"""The README's code runs as it stands."""

import re
from pathlib import Path

import torch

from kfac_fast import KFAC

README = (Path(__file__).parent.parent / "README.md").read_text()


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_training_loop_runs_and_lowers_the_loss(capsys) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    images = torch.randn(32, 1, 8, 8)
    labels = images.mean((1, 2, 3)).argsort().argsort() // 11
    names = {"torch": torch, "model": model, "data": [(images, labels)] * 20}
    before = torch.nn.functional.cross_entropy(model(images), labels).item()
    exec(_blocks()[0], names)
    after = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert after < 0.5 * before
    assert "Conv2d" in capsys.readouterr().out


def test_the_line_between_the_passes_leaves_the_gradients_alone() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    images, labels = torch.randn(5, 4), torch.randint(3, (5,))
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(images), labels), model.weight
    )[0]
    for fisher in ("mc", "exact", "curvature-propagation"):
        model.zero_grad()
        kfac = KFAC(model, fisher=fisher)
        exec(
            _blocks()[1],
            {"torch": torch, "model": model, "images": images, "labels": labels, "kfac": kfac},
        )
        assert torch.equal(model.weight.grad, expected)
        kfac.step()
        assert not torch.equal(model.weight.grad, expected)
        kfac.detach()


def test_the_operators_run_and_give_what_the_comments_say() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    running = torch.zeros(6, 6)
    squares = {name: torch.eye(n) for name, n in (("a1", 5), ("g1", 3), ("a2", 4), ("g2", 2))}
    grads = [torch.randn(3, 5), torch.randn(2, 4)]
    images = torch.randn(2, 8, 6, 6)
    names = {"x": x, "running": running, "images": images, "grads": grads, **squares}
    exec(_blocks()[2], names)
    rows = torch.cat([x, torch.ones(30, 1)], 1)
    torch.testing.assert_close(names["covariance"], rows.T @ rows)
    torch.testing.assert_close(running, 0.05 * rows.T @ rows)
    patches = torch.nn.functional.unfold(images, 3, padding=1, stride=2).unflatten(1, (4, 18))
    expected = torch.einsum("ngds,nges->gde", patches, patches)
    torch.testing.assert_close(names["factors"], expected)
    torch.testing.assert_close(names["steps"][0], grads[0] / 1.001**2)
