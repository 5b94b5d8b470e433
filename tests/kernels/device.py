"""Where kernel tests run: on a GPU if there is one, else in Triton's interpreter on the CPU."""

import torch

__all__ = ["DEVICE"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
