"""LoRA and QLoRA from scratch in NumPy, with a CuPy backend: a reference to read and to run."""

from .fast import cpu as cpu  # registers the faster rules for NumPy

__version__ = "0.1.0"
