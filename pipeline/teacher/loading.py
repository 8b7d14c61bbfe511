"""A teacher's tokenizer and model by name or folder, with transformers' many errors as one line.

TeacherConfig -> load_tokenizer; load_model -> a frozen model on its device
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils.hub import try_to_load_from_cache

from pipeline.config import StrictModel
from pipeline.errors import ModelError
from pipeline.safe_loading import require_safetensors


class TeacherConfig(StrictModel):
    """Where a teacher comes from and how it is run.

    Attributes:
        model: a name on the hub, or a folder that `save_pretrained` wrote.
        revision: branch, tag or commit on the hub.
        dtype: "auto" takes what the weights are stored in, and float32 on a CPU, where half
            precision is emulated and several times slower.
        device: "auto" takes a GPU where there is one; ignored where `device_map` is given.
        attn_implementation: as transformers names them (sdpa, eager, flash_attention_2, ...).
        device_map: as transformers names them, for a teacher larger than one GPU.
        trust_remote_code: run code that comes with the model.
        licence: what the model card says of the teacher, for instance apache-2.0.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    attn_implementation: str | None = None
    device_map: str | dict[str, int | str] | None = None
    trust_remote_code: bool = False
    licence: str | None = None


def load_tokenizer(config: TeacherConfig) -> Any:
    """Load the teacher's tokenizer.

    Raises:
        ModelError: there is no such model, or no tokenizer with it.
    """
    _check_folder(config)
    try:
        return transformers.AutoTokenizer.from_pretrained(config.model, **_source(config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{config.model}: no tokenizer can be loaded ({_reason(error)}); give a model with its"
            " tokenizer files"
        ) from error


def load_settings(config: TeacherConfig) -> Any:
    """The teacher's configuration alone, without its weights.

    Raises:
        ModelError: there is no such model.
    """
    _check_folder(config)
    try:
        return transformers.AutoConfig.from_pretrained(config.model, **_source(config))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{config.model}: has no configuration ({_reason(error)})") from error


def load_model(
    config: TeacherConfig, auto_class: str, label_names: Sequence[str] | None = None
) -> Any:
    """Load a teacher for one task, in evaluation mode, without gradients, on its device.

    Args:
        config: which one, and how it is run.
        auto_class: the transformers Auto class of the task.
        label_names: the data's classes, for a teacher that classifies.

    Raises:
        ModelError: there is no such model, its architecture or weights do not fit the task, or its
            labels are not those of the data.
    """
    _check_folder(config)
    require_safetensors(config.model)
    arguments: dict[str, Any] = {
        "dtype": config.dtype,
        "device_map": config.device_map,
        "use_safetensors": True,
    }
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    factory = getattr(transformers, auto_class)
    try:
        model, info = factory.from_pretrained(
            config.model, output_loading_info=True, **arguments, **_source(config)
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError),
        SafetensorError,  # weights that are cut off, for instance
    ) as error:
        raise ModelError(
            f"{config.model}: cannot be loaded as {auto_class} ({_reason(error)})"
        ) from error
    _check_weights(config.model, auto_class, info)
    if label_names is not None:
        _check_labels(config.model, model.config, label_names)
    model.config.use_cache = False  # with a key-value cache, packed documents are not isolated
    model.eval().requires_grad_(False)
    if config.device_map is not None:
        return model
    device = choose_device(config.device)
    return model.float() if config.dtype == "auto" and device.type == "cpu" else model.to(device)


def choose_device(device: str) -> torch.device:
    """The device that a config's `device` means here.

    Raises:
        ModelError: it is none, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"teacher.device: {device!r} cannot be used here ({_reason(error)}); use auto or cpu"
        ) from error
    return chosen


def describe_files(config: TeacherConfig) -> dict[str, Any]:
    """What tells, without reading the weights, that the teacher's files were not touched.

    Returns:
        Names, sizes and times of a folder's files, or the commit of a model from the hub; empty
        where that is not known on this machine.
    """
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return {"commit": Path(found).parent.name} if isinstance(found, str) else {}


def _source(config: TeacherConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _check_folder(config: TeacherConfig) -> None:
    """A path that is not there must not be looked for on the hub."""
    name = config.model
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    folder = Path(name).expanduser()
    if is_path and not folder.is_dir():
        raise ModelError(f"{name}: no such folder; give a model's folder or its name on the hub")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{name}: holds no config.json, so it is no model that transformers saved")


def _check_weights(name: str, auto_class: str, info: Any) -> None:
    """Newly initialised weights would teach noise."""
    missing = sorted(info["missing_keys"])
    if auto_class == "AutoModel":  # of its outputs only hidden states are read
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise ModelError(
            f"{name}: has no weights for {missing[0]} ({len(missing)} missing) as {auto_class};"
            " train it for this task first (`stillroom train-teacher`), or give one that was"
        )
    if info.get("mismatched_keys"):
        raise ModelError(f"{name}: has weights of other shapes than its config.json says")


def _check_labels(name: str, config: Any, label_names: Sequence[str]) -> None:
    if config.num_labels != len(label_names):
        raise ModelError(
            f"{name}: has {config.num_labels} labels, the data have {len(label_names)}"
            f" ({', '.join(label_names[:8])}); give a teacher that was trained on these"
        )
    own = [config.id2label[index] for index in range(config.num_labels)]
    if own != list(label_names) and not all(label.startswith("LABEL_") for label in own):
        raise ModelError(
            f"{name}: its labels are {', '.join(own[:8])}, the data's are"
            f" {', '.join(label_names[:8])}; set data.label_names to the teacher's order"
        )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
