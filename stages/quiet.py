"""Other libraries without their own bars and reports: a stage shows one bar, its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bar for files read, written or prepared, no report on weights; downloads keep theirs.

    What matters is raised as an error. Works as a decorator too, and leaves all as it was.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    preparing = not datasets.are_progress_bars_disabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if downloads:
        enable_progress_bars()  # transformers turns the downloads' bars off with its own
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if not downloads:
                disable_progress_bars()
        if preparing:
            datasets.enable_progress_bars()
