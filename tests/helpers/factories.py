"""Tiny models. They are module-level functions, so that Spark's workers import them by name."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torchvision.models import DenseNet, SwinTransformer, VisionTransformer


class Tiny(nn.Module):
    """Maps ``(N, 3, S, S)`` to 8 pooled features and 5 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=5, stride=4)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.conv(images).relu().mean((2, 3))
        logits: torch.Tensor = self.fc(features)
        return logits


def tiny() -> nn.Module:
    return Tiny()


def tiny_vit() -> nn.Module:
    """Builds a model for ``(N, 3, 32, 32)``."""
    return VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=5,
    )


def tiny_swin() -> nn.Module:
    """Builds a model for ``(N, 3, 32, 32)``."""
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=5,
    )


def tiny_densenet() -> nn.Module:
    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


def logging_tiny(log: str) -> nn.Module:
    """Builds a model, and appends the process id to a log file."""
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return Tiny()
