"""What a user deploys of a run's folder: weights, configuration, tokenizer. No curve, no paths."""

import shutil
from pathlib import Path

import torch
import transformers

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SETTINGS = ("config.json", "generation_config.json")


def copy_weights(run: Path, folder: Path) -> None:
    """Copy weights and configuration as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (*_WEIGHTS, *_SETTINGS):
        for file in run.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def save_as(model: transformers.PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Write a model, which is changed, with its floating-point weights in another precision."""
    model.to(dtype).save_pretrained(folder)


def copy_tokenizer(run: Path, folder: Path) -> None:
    """Write the run's tokenizer, as transformers writes it."""
    transformers.AutoTokenizer.from_pretrained(run).save_pretrained(folder)


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files of an export or a run."""
    patterns = ("*.safetensors", "*.onnx", "*.onnx.data")
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
