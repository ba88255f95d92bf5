"""LoRA and QLoRA from scratch in NumPy, with a CuPy backend: a reference to read and to run.

What most readers need stands here by name; everything else is imported from its file.
"""

from . import fast as _fast  # noqa: F401  (registers the faster rules)
from .engine.backend import to_device as array_to_device
from .engine.errors import MiniloraError
from .engine.graph import together
from .engine.recompute import recompute
from .engine.rules import reference_rules, rule
from .engine.tensor import Parameter, Tensor, op
from .lora.lora import LoRALinear, adapt, merge, trainable_share
from .model.generate import generate
from .model.module import (
    count,
    freeze,
    module,
    parameters,
    rebuild,
    summary,
    to_device,
    unfreeze,
    walk,
)
from .model.transformer import Transformer, TransformerConfig, init_transformer
from .optim.adamw import SGD, AdamW
from .optim.schedule import schedule
from .train.data import Data
from .train.loop import Fit, evaluate, fit
from .train.task import Settings, Splits, Task
from .train.tasks import get_task

__version__ = "0.1.0"
__all__ = [
    "AdamW", "Data", "Fit", "LoRALinear", "MiniloraError", "Parameter", "SGD", "Settings",
    "Splits", "Task", "Tensor", "Transformer", "TransformerConfig", "adapt", "array_to_device",
    "count", "evaluate", "fit", "freeze", "generate", "get_task", "init_transformer", "merge",
    "module", "op", "parameters", "rebuild", "recompute", "reference_rules", "rule", "schedule",
    "summary", "to_device", "together", "trainable_share", "unfreeze", "walk",
]  # fmt: skip
