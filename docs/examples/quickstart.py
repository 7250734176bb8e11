"""Train a small classifier without calling ``.backward()``. Takes a few seconds."""

import torch
import torch.nn.functional as F

from guessopt import GuessGradOptimizer, WPerp

torch.manual_seed(0)
inputs = torch.randn(1024, 20)
labels = (inputs[:, :4].sum(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
opt = GuessGradOptimizer(model.parameters(), base=torch.optim.AdamW, estimator=WPerp(k=10), lr=3e-3)

for epoch in range(10):
    for x, y in zip(inputs.split(64), labels.split(64)):
        loss = opt.step(lambda: F.cross_entropy(model(x), y))  # in place of zero_grad(), backward() and step()
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy.item():.3f}")
