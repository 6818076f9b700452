"""ONNX graphs run by onnxruntime itself, and networks small enough to export within seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from attention.drawing import feature_map, randomise
from torch import Tensor, nn

import spem

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

FORBIDDEN = {"TopK", "If", "Loop", "Scan"}
"""Operators that targets often lack, beside all whose name starts with Scatter."""


def ran(path: Path, x: Tensor) -> np.ndarray:
    """The one output of a graph for one input."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    kind = np.float16 if value.type == "tensor(float16)" else np.float32
    (output,) = session.run(None, {value.name: x.numpy().astype(kind)})
    return output.astype(np.float32)


def expected(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def loaded(path: Path):
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    return model


def operators(path: Path) -> list[str]:
    """The operators of a graph, with those in its branches; all must be ONNX's own."""
    model = loaded(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    return sorted(node.op_type for node in model.graph.node)


def module(spec: str, channels: int = 64, size: int = 8) -> spem.ChannelAttention:
    """A module with everything drawn at random, in evaluation mode."""
    built = spem.create_attention(spec, channels, size=size)
    return randomise(built, "export", spec).eval()


def maps(*shape: int, key: object = 0) -> Tensor:
    """Maps whose means are away from zero, where a norm over a plane is well conditioned."""
    return (feature_map(*shape, key=("export", key)) + 1.5).float()


class Network(nn.Module):
    """A convolution, a norm, an attention and a mean."""

    def __init__(self, attention: nn.Module, channels: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.attention = attention
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.attention(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def network(attention: nn.Module) -> Network:
    return randomise(Network(attention), "network").eval()
