"""transformers without its own bars and reports: what matters is raised, the rest is noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    enable_progress_bars,
)
from torch import nn
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bar for every file read or written, no report on weights; downloads keep theirs."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turn the key-value cache off: with it, transformers lets packed documents see one another.

    The configuration is left as it was found, for whoever generates with the model.
    """
    config: Any = model.config
    missing = object()
    before = vars(config).get("use_cache", missing)
    config.use_cache = False
    try:
        yield
    finally:
        if before is missing:
            del config.use_cache
        else:
            config.use_cache = before
