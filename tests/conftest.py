"""What all tests share: reproducible properties and numbers, and an object store of the session."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from small_hub import hub  # noqa: F401
from small_store import bucket, store  # noqa: F401

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets, imported later, would ask the network
settings.register_profile("stillroom", deadline=None, derandomize=True)
settings.load_profile("stillroom")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin each test with the same random numbers, whichever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
