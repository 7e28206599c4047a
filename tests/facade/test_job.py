"""A comparison of sparse training on a convolutional network, as its author would write it."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import topkast_func as tk


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 4  # which quarter is bright
    quarters = torch.eye(4)[labels].view(n, 1, 2, 2)
    return interpolate(quarters, scale_factor=4) + 0.3 * torch.randn(n, 3, 8, 8), labels


def test_a_vgg_with_every_linear_and_convolution_sparse(tmp_path: Path) -> None:
    model, (pictures, labels) = vgg(), images(256)
    config = tk.TopKastConfig(
        forward_sparsity=0.8,
        backward_sparsity=1 - (1 + 0.5) * (1 - 0.8),  # |B| = (1 + g)·|A|
        sparse=lambda name, weight: weight.ndim in (2, 4),
        allocation="erk",
        refresh_every={0: 1, 32: 10},  # at every step for the first epochs, then rarely
        penalty="group_l2",
        penalty_weight=1e-3,
    )
    sparsifier = tk.sparsify(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4], gamma=0.1)
    for epoch in range(6):
        for batch in torch.randperm(256).view(16, 16):
            optimizer.zero_grad()
            loss = cross_entropy(model.train()(pictures[batch]), labels[batch])
            (loss + sparsifier.penalty()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            sparsifier.step()
        scheduler.step()
        right = (model.eval()(pictures).argmax(1) == labels).float().mean().item()
        with (tmp_path / "metrics.csv").open("a") as file:
            rows = sparsifier.summary().rows
            csv.writer(file).writerows([epoch, right, r.name, r.forward_density] for r in rows)
        parts: list[Any] = [model, optimizer, scheduler, sparsifier]
        torch.save([part.state_dict() for part in parts], tmp_path / f"{epoch}.pt")
    kept = sum(int(masks.forward.sum()) for masks in sparsifier.masks().values())
    assert kept == round(0.2 * sum(p.numel() for p in model.parameters() if p.ndim > 1))
    vgg().load_state_dict(tk.densify(model).state_dict())
    assert right > 0.9
