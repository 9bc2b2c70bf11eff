"""Settings of every test run. The environment variables stand first: torch and the Hub's client read them on import."""

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads that spin collapse beside a busy neighbour
os.environ["OMP_NUM_THREADS"] = "1"  # workers run side by side, one thread each
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network would fail elsewhere: let it fail here
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "house",
    derandomize=True,  # the same examples in every run: a red test is red for everyone
    deadline=None,  # the machine is shared; a slow example is no failure
    print_blob=True,
)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]
