"""Models and tokenizers of others: read as data, never run.

    folder or hub name -- require_safetensors --> from_pretrained(..., **NO_CODE)
    folder -- open_tokenizer --> a tokenizer, without the network

A model's own code runs only where a config says `trust_remote_code`; pickles, which hold code by
their nature, are never opened.
"""

from pathlib import Path
from typing import Any

from pipeline.errors import ModelError

# False and not None: None asks whoever sits at the terminal.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def require_safetensors(name: str) -> None:
    """Refuse a folder whose weights are there as a pickle alone; what is no folder passes.

    Raises:
        ModelError: says how to convert them.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{name}: its weights are in {pickled[0]}, a pickle, which can run code when it is"
            " opened; expected model.safetensors; where you trust it, convert it with the task's"
            " Auto class: .from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER)"
        )


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder: nothing of it is run, nothing is asked of the network.

    Raises:
        ModelError: it holds none, one that needs code of its own, or a damaged one.
    """
    import transformers

    if not folder.is_dir():  # else a relative path would be taken for a name on the hub
        raise ModelError(f"{folder}: no such folder; it should hold the teacher's tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
    except BaseException as error:
        # The parser in Rust raises a panic that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{folder}: holds no tokenizer that can be opened ({lines[0][:200]}); copy the folder"
            " again, or cache the teacher again"
        ) from error
