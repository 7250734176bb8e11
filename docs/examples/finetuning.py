"""Fine-tune a frozen network with LoRA and a new head, without backpropagation. Takes a few seconds.

Replace ``pretrained`` by your own model, and the random data by your own. Everything else can stay.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import guessopt
from guessopt import GuessGradOptimizer, LearnedFeedback

RANK = 4


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, which is zero at the start."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def data(count, turn):
    """Points in 16 dimensions. Their class is the largest of four projections, which depend on ``turn``."""
    x = torch.randn(count, 16)
    return x, (x @ torch.randn(16, 4, generator=torch.Generator().manual_seed(turn))).argmax(1)


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(model, opt, x, y, steps):
    """So many steps on random batches of 64 examples."""
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        opt.zero_grad()
        opt.step(lambda: F.cross_entropy(model(x[index]), y[index]))


def pretrained():
    """A network that has learned another task. Yours comes from a file."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x, y = data(2048, turn=0)
    train(
        model, GuessGradOptimizer(model.parameters(), torch.optim.AdamW, LearnedFeedback(gamma=0), lr=3e-3), x, y, 300
    )
    return model


torch.manual_seed(0)
(x, y), (x_test, y_test) = data(1024, turn=1), data(1024, turn=1)
frozen = pretrained().requires_grad_(False)
frozen[4] = nn.Linear(64, 4)  # a new head for the new task

# The control: the head alone. Its gradient needs no backpropagation, so anything else has to beat it.
head = copy.deepcopy(frozen)
train(head, GuessGradOptimizer(head[4].parameters(), torch.optim.AdamW, lr=3e-3), x, y, 300)
print(f"head alone:     test accuracy {accuracy(head, x_test, y_test):.3f}")

# Head and body: freeze first, then build the optimizer from the parameters that still require gradients.
model = copy.deepcopy(frozen)
model[0], model[2] = LoRA(model[0]), LoRA(model[2])
tuned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
opt = GuessGradOptimizer(tuned, torch.optim.AdamW, LearnedFeedback(gamma=0), lr=3e-3)
print(guessopt.preflight(opt, lambda: F.cross_entropy(model(x[:64]), y[:64])))
train(model, opt, x, y, 300)
print(f"head and LoRA:  test accuracy {accuracy(model, x_test, y_test):.3f}")
