"""What a user deploys of a run's folder: weights, configuration, tokenizer. No curve, no paths."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers

from pipeline.safe_loading import NO_CODE

_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("modules.json", "sentence_bert_config.json", "[0-9]_*"),  # of a sentence encoder
)


def copy_weights(run: Path, folder: Path) -> None:
    """Copy weights and configuration as they are."""
    for pattern in _COPIED:
        for path in run.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)


def drop_weights(folder: Path) -> None:
    """Remove the weights that transformers wrote, and leave what stands beside them."""
    for pattern in _COPIED[:2]:
        for file in folder.glob(pattern):
            file.unlink()


def write_settings(folder: Path) -> None:
    """Write what sentence-transformers keeps of a model beside its modules."""
    settings: dict[str, Any] = {
        "similarity_fn_name": "cosine",
        "prompts": {},
        "default_prompt_name": None,
    }
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(run: Path, folder: Path) -> None:
    """Write the run's tokenizer, as transformers writes it."""
    transformers.AutoTokenizer.from_pretrained(run, **NO_CODE).save_pretrained(folder)


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files of an export or a run."""
    patterns = ("*.safetensors", "[0-9]_*/*.safetensors", "*.onnx", "*.onnx.data")
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
