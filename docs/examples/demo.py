"""Estimators beside backpropagation on MNIST-1D: accuracy, and how close the gradients are to the true ones.

    python demo.py --epochs 40        # half a minute; the figures in the README are after 300 epochs

Needs the package mnist1d. ``make demo`` in the repository measures time and memory as well.
"""

import argparse

import torch
import torch.nn.functional as F
from mnist1d.data import get_dataset_args, make_dataset

from guessopt import ActivationPerturbation, GuessGradOptimizer, LearnedFeedback, WPerp, WTranspose
from guessopt.diagnostics import cosine

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--batch", type=int, default=512)
parser.add_argument("--lr", type=float, default=1e-3)
args = parser.parse_args()

arrays = make_dataset(get_dataset_args())
x, x_test = (torch.tensor(arrays[name], dtype=torch.float32) for name in ("x", "x_test"))
y, y_test = (torch.tensor(arrays[name]) for name in ("y", "y_test"))

ESTIMATORS = {
    "backprop": None,
    "learned feedback": LearnedFeedback(gamma=0),
    "W-perp": WPerp(k=10),
    "W^T": WTranspose(),
    "activation perturbation": ActivationPerturbation(),
}


def build(estimator):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 128), torch.nn.ReLU()]
    for _ in range(2):
        layers += [torch.nn.Linear(128, 128), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(128, 10))
    if estimator is None:
        return model, torch.optim.AdamW(model.parameters(), lr=args.lr)
    return model, GuessGradOptimizer(model.parameters(), torch.optim.AdamW, estimator, lr=args.lr)


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


print(f"{'method':<24} {'train':>6} {'test':>6} {'cosine':>7}")
for name, estimator in ESTIMATORS.items():
    model, opt = build(estimator)
    for _ in range(args.epochs):
        for index in torch.randperm(len(x)).split(args.batch):
            opt.zero_grad()
            if estimator is None:
                F.cross_entropy(model(x[index]), y[index]).backward()
                opt.step()
            else:
                opt.step(lambda: F.cross_entropy(model(x[index]), y[index]))
    close = 1.0 if estimator is None else cosine(opt, lambda: F.cross_entropy(model(x), y)).total
    print(f"{name:<24} {accuracy(model, x, y):6.3f} {accuracy(model, x_test, y_test):6.3f} {close:7.3f}")
