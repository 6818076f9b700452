"""Training runs: configs and recipes, the loop, checkpoints, run folders."""

from spem.training.checkpoint import load_weights, save_weights
from spem.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig
from spem.training.distributed import process_group
from spem.training.evaluation import Accuracy, evaluate
from spem.training.log import Progress, Silent, read_metrics
from spem.training.loop import train
from spem.training.recipes import fast, paper, short, smoke
from spem.training.runs import Result, read_config, read_result
from spem.training.signals import Interrupted

__all__ = [
    "Accuracy",
    "DataConfig",
    "Interrupted",
    "ModelConfig",
    "OptimConfig",
    "Progress",
    "Result",
    "RunConfig",
    "RuntimeConfig",
    "Silent",
    "evaluate",
    "fast",
    "load_weights",
    "paper",
    "process_group",
    "read_config",
    "read_metrics",
    "read_result",
    "save_weights",
    "short",
    "smoke",
    "train",
]
