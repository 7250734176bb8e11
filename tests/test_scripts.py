"""Standard PyTorch training scripts with two lines swapped: the optimizer, and zero_grad/backward/step."""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from guessopt import GuessGradOptimizer

Images = tuple[Tensor, Tensor]
Loader = DataLoader[tuple[Tensor, ...]]
Loss = Callable[[Tensor, Tensor], Tensor]


# -------------------------------------------------------------------- pytorch.org/tutorials: quickstart


class NeuralNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear_relu_stack(self.flatten(x))
        return logits


def clothes(count: int = 600) -> Images:
    """Ten prototypes and noise, in FashionMNIST's shapes."""
    labels = torch.randint(10, (count,))
    return torch.randn(10, 1, 28, 28)[labels] + 0.5 * torch.randn(count, 1, 28, 28), labels


def quickstart_train(
    dataloader: Loader,
    model: nn.Module,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
) -> Iterator[float]:
    model.train()
    for X, y in dataloader:
        loss = optimizer.step(lambda: loss_fn(model(X), y))  # type: ignore[arg-type,return-value]  # noqa: B023
        yield float(loss)


def quickstart_test(images: Images, model: nn.Module, loss_fn: Loss) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        pred = model(images[0])
        return loss_fn(pred, images[1]).item(), (pred.argmax(1) == images[1]).float().mean().item()


QUICKSTART: dict[str, Callable[[nn.Module], GuessGradOptimizer]] = {
    "AdamW": lambda m: GuessGradOptimizer(m.parameters(), torch.optim.AdamW, lr=1e-3),
    "SGD": lambda m: GuessGradOptimizer(m.parameters(), torch.optim.SGD, lr=0.1),
}


@pytest.mark.parametrize("build", QUICKSTART.values(), ids=QUICKSTART)
def test_quickstart_learns(build: Callable[[nn.Module], GuessGradOptimizer]) -> None:
    """Five epochs of ten batches; the last batch is smaller. The loss falls from 2.30 to about 0.02 with either
    base."""
    data = clothes()
    dataloader = DataLoader(TensorDataset(*data), batch_size=64, shuffle=True)
    model, loss_fn = NeuralNetwork(), nn.CrossEntropyLoss()
    optimizer = build(model)
    losses = [loss for _ in range(5) for loss in quickstart_train(dataloader, model, loss_fn, optimizer)]
    assert len(losses) == 50
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]
    loss, accuracy = quickstart_test(data, model, loss_fn)
    assert loss < 0.5 * losses[0]
    assert accuracy > 0.5


# ------------------------------------------------------------------------ pytorch/examples: imagenet/main.py


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    with torch.no_grad():
        _, pred = output.topk(max(topk), 1, True, True)
        correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
        return [correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / target.size(0)) for k in topk]


def photographs(count: int = 8) -> Loader:
    images = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(1000, (count,)))
    return DataLoader(images, batch_size=4, shuffle=True)


def imagenet_train(
    train_loader: Loader,
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[float, float, Tensor, Tensor]]:
    """Of each batch: loss, top-5 accuracy, output and target."""
    model.train()
    for images, target in train_loader:
        seen: list[Tensor] = []

        def closure() -> Tensor:
            output = model(images)  # noqa: B023
            seen.append(output)  # noqa: B023
            loss: Tensor = criterion(output, target)  # noqa: B023
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        yield float(loss), accuracy(seen[-1], target, topk=(1, 5))[1].item(), seen[-1], target


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")  # BatchNorm couples the examples
@pytest.mark.filterwarnings("error:Detected call of")
def test_imagenet_resnet18() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18()
    criterion = nn.CrossEntropyLoss()
    optimizer = GuessGradOptimizer(
        model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4, seed=0
    )
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    batches = list(imagenet_train(photographs(), model, criterion, optimizer))
    scheduler.step()

    assert len(batches) == 2
    for loss, top5, output, target in batches:  # the output outlives the step, as it was when the loss was computed
        assert float(criterion(output, target)) == pytest.approx(loss, rel=1e-5)
        hits = (output.argsort(1, descending=True)[:, :5] == target[:, None]).any(1)
        assert top5 == pytest.approx(100 * float(hits.float().mean()))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
        assert bool(p.grad.any()), name
    after = model.state_dict()
    for name, value in before.items():
        if name.endswith("num_batches_tracked"):
            assert int(after[name]) == 2, name
        else:
            assert not torch.equal(after[name], value), name
            assert bool(torch.isfinite(after[name]).all()), name

    file = io.BytesIO()
    torch.save({"state_dict": after, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
