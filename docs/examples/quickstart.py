"""Train a small classifier without calling ``.backward()``. Takes a few seconds."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from guessopt import GuessGradOptimizer, WPerp

torch.manual_seed(0)
inputs = torch.randn(1024, 20)
labels = (inputs[:, :4].sum(1) > 0).long()
loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
opt = GuessGradOptimizer(model.parameters(), base=torch.optim.AdamW, estimator=WPerp(k=10), lr=3e-3)

for epoch in range(10):
    for x, y in loader:
        opt.zero_grad()
        loss = opt.step(lambda: F.cross_entropy(model(x), y))
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy.item():.3f}")
