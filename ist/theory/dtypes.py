"""The precisions that experiments offer, by name."""

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32}
