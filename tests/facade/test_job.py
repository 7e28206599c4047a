"""A comparison of sparse training on a convolutional network, as its author would write it."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import topkast_func as tk


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 4
    pictures = 0.3 * torch.randn(n, 3, 8, 8)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[
            :, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4
        ] += 1
    return pictures, labels


def test_a_vgg_with_every_linear_and_convolution_sparse(tmp_path: Path) -> None:
    model, (pictures, labels) = vgg(), images(256)
    config = tk.TopKastConfig(
        0.8,
        1 - (1 + 0.5) * (1 - 0.8),  # |B| = (1 + g)·|A|
        sparse=lambda name, weight: weight.ndim in (2, 4),
        allocation="erk",
        refresh_every={0: 1, 32: 10},  # at every step for the first epochs, then rarely
        penalty="group_l2",
        penalty_weight=1e-3,
    )
    sparsifier = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4], gamma=0.1)
    accuracies = []
    for epoch in range(6):
        for rows in torch.randperm(256).view(16, 16):
            optimizer.zero_grad()
            loss = cross_entropy(model(pictures[rows]), labels[rows]) + sparsifier.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sparsifier.step()
        scheduler.step()
        with torch.no_grad():
            accuracies.append((model.eval()(pictures).argmax(1) == labels).float().mean().item())
        model.train()
        parts: list[Any] = [model, optimizer, scheduler, sparsifier]
        torch.save([part.state_dict() for part in parts], tmp_path / f"{epoch}.pt")
    with (tmp_path / "sparsities.csv").open("w", newline="") as file:
        table = csv.writer(file)
        for row in sparsifier.summary().rows:
            table.writerow([row.name, 1 - row.forward_density, 1 - row.backward_density])
    kept = sum(int(masks.forward.sum()) for masks in sparsifier.masks().values())
    assert kept == round(0.2 * sum(p.numel() for p in model.parameters() if p.ndim > 1))
    vgg().load_state_dict(tk.densify(model).state_dict())
    assert accuracies[-1] > 0.9
