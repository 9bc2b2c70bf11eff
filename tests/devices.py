"""Devices that a test's body runs on: always the CPU, and a GPU where there is one (`pytest -m gpu`)."""

import pytest
import torch

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
