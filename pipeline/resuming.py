"""The folder of a run under way: whose it is, where it can continue, when it is finished.

config.yaml -> checkpoints -> result.json, which makes it whole
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.trainer_utils import rotate_checkpoints

from pipeline.arguments import EarlyStopping
from pipeline.config import StrictModel, dump_config, parse_config
from pipeline.errors import ConfigError
from pipeline.lineage import IDENTITY, read_lineage, require_same_lineage
from pipeline.runs import RESULT, Result, write_json, write_result
from pipeline.storage import remove_tree, sync_file, sync_folder, sync_tree

_FURTHER = "further_teachers."
_CACHES = ("manifest.json", "draft.json", "view.json")


def is_finished(
    output: Path,
    config: StrictModel,
    lineage: Mapping[str, str] | None = None,
    tasks: Collection[str] = (),
) -> bool:
    """Whether the run in the folder is finished; a folder of another config is refused.

    Nothing is written.

    Args:
        lineage: what the run learns from, see `describe_lineage`; None where it is no student.
        tasks: of a student of several, whose results stand in folders of their names, and whose
            lineage has these before its own names.

    Raises:
        ConfigError: the folder holds a cache, or a run, finished or under way, of another config.
        MismatchError: it has learned from something else.
    """
    results = _look_for_results(output, tasks)
    for name in _CACHES:
        if (output / name).is_file():
            raise ConfigError(f"{output}: holds a cache ({name}); choose another output")
    if _can_go_on(output, any(results)):
        there, here = _compare(output, config)
        free = _list_places(output, lineage or {}, tasks)
        key = next((k for k in sorted({*there, *here} - free) if there.get(k) != here.get(k)), None)
        if key is not None:
            raise ConfigError(
                f"{output}: holds a run of another config ({key}: {there.get(key)} there,"
                f" {here.get(key)} here); choose another output, or delete the folder"
            )
        if lineage is not None:
            require_same_lineage(output, lineage)
    return all(results)


def check_run_folder(
    output: Path,
    config: StrictModel,
    lineage: Mapping[str, str] | None = None,
    tasks: Collection[str] = (),
) -> bool:
    """As `is_finished`, and prepare the folder: for whoever is alone at work there.

    Writes config.yaml into a folder where nothing was trained yet, and identity.json beside it.
    """
    finished = is_finished(output, config, lineage, tasks)
    begun = any(_look_for_results(output, tasks))
    if _can_go_on(output, begun):
        there, here = _compare(output, config)
        if there != here:  # moved: where it is read from the next time
            _write_whole(output / "config.yaml", dump_config(config))
    else:
        if not ((output / "config.yaml").is_file() or begun):
            _remove_remains(output)
        output.mkdir(parents=True, exist_ok=True)
        _write_whole(output / "config.yaml", dump_config(config))
        if lineage is not None:
            _write_whole(output / IDENTITY, json.dumps(dict(lineage), indent=2) + "\n")
    if finished:  # perhaps killed before all was tidy
        remove_leftovers(output)
    return finished


def _look_for_results(output: Path, tasks: Collection[str]) -> list[bool]:
    """Which of those that make it whole are there."""
    return [(output / task / RESULT).is_file() for task in tasks or ("",)]


def _can_go_on(output: Path, begun: bool) -> bool:
    """Whether a run stands there whose config says what it is."""
    return (begun or _begun(output / "checkpoints")) and (output / "config.yaml").is_file()


def _compare(output: Path, config: StrictModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain values of a run's config and of another one, by their keys."""
    here = yaml.safe_load(dump_config(config))
    return _flatten(_resolve(output / "config.yaml", config)), _flatten(here)


def _list_places(output: Path, lineage: Mapping[str, str], tasks: Collection[str]) -> set[str]:
    """Settings that say where something is, of which the run knows by content what it is."""
    places = {"output"}
    known = {*read_lineage(output)} & {*lineage} if lineage else set()
    for told, section in [(f"{task}.", f"tasks.{task}.") for task in tasks] or [("", "")]:
        own = {name.removeprefix(told) for name in known if name.startswith(told)}
        places |= {f"{section}cache"} if "cache" in own else set()
        further = [name.removeprefix(_FURTHER) for name in own if name.startswith(_FURTHER)]
        places |= {f"{section}{_FURTHER}caches.{name}.cache" for name in further}
    return places


def _write_whole(path: Path, text: str) -> None:
    """Whoever looks sees the whole of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    sync_file(draft)
    draft.replace(path)


def finish_run(output: Path, result: Result) -> None:
    """Write the result, which makes the run whole; only then are its checkpoints of no use."""
    for path in output.iterdir():
        if path.is_dir() and path.name != "checkpoints":
            sync_tree(path)
        elif path.is_file():
            sync_file(path)
    write_result(output, result)
    sync_folder(output)
    remove_leftovers(output)


def _remove_remains(output: Path) -> None:
    """Remove what a run saved after its folder had vanished under it: half of its state."""
    remove_tree(output / "checkpoints")
    (output / "metrics.jsonl").unlink(missing_ok=True)


def remove_leftovers(output: Path) -> None:
    """Remove what only a run under way has, and what a process that was killed left half."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for pattern in (
        "*.draft",
        "config.yaml.*",
        f"{IDENTITY}.*",
        ".tmp*",
    ):  # the last are safetensors' own
        for path in output.glob(pattern):
            path.unlink(missing_ok=True)


class Patience(transformers.EarlyStoppingCallback):  # type: ignore[misc]  # ships without types
    """Stops a run that has not improved, and one that an earlier session had stopped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class DurableCheckpoints(transformers.TrainerCallback):  # type: ignore[misc]  # ships without types
    """Removes older checkpoints only once the new one is on the disk, not just in its cache.

    A run whose last step is saved takes no step more, which transformers would where the last step
    ends no epoch.
    """

    def __init__(self, run: Path) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the removal over from transformers, which does not wait."""
        self._limit, args.save_total_limit = args.save_total_limit, None
        self._marks = list(self._run.glob("config.yaml"))
        control.should_save = False  # or a restored state, which was being saved, is saved again
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the checkpoint to the disk, then remove those that are too many."""
        if not args.should_save:
            return
        for file in self._marks:
            file.stat()  # saving would make a folder anew that was removed, and all seem well
        sync_tree(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        sync_folder(Path(args.output_dir))
        best = state.best_model_checkpoint
        rotate_checkpoints(args.output_dir, self._limit, best, use_mtime=True)


def session_guards(run: Path, stopping: EarlyStopping | None) -> list[transformers.TrainerCallback]:
    """What every training needs so that its next session goes on where this one ended."""
    return [DurableCheckpoints(run), *([Patience(stopping.patience)] if stopping else [])]


@dataclass(frozen=True)
class Taken:
    """What a training took up to some point, all its stages and sessions together.

    Attributes:
        steps: optimizer steps.
        epochs: passes over the examples.
        examples, tokens: that were read, epochs included.
        seconds: of training alone, without evaluation.
    """

    steps: int = 0
    epochs: float = 0.0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_stage(folder: Path, weights: Mapping[str, Any], taken: Taken) -> None:
    """Keep the weights that a stage ended with; stage.json, written last, makes them whole."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights), folder / "weights.pt")
    sync_file(folder / "weights.pt")
    write_json(folder / "stage.json", asdict(taken))
    sync_folder(folder)
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def read_stage(folder: Path) -> tuple[Taken, dict[str, Any]] | None:
    """What a stage took and the weights that it ended with; None where it has not ended."""
    record = folder / "stage.json"
    if not record.is_file():
        return None
    weights = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    return Taken(**json.loads(record.read_text(encoding="utf-8"))), weights


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first: trainer_state.json is what transformers writes last."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            continue  # cut off
        found.append(state.parent)
    return sorted(found, key=lambda path: step_of(path.name) or 0)


def step_of(checkpoint: str | None) -> int | None:
    """The optimizer step after which a checkpoint was saved."""
    return None if checkpoint is None else int(checkpoint.rpartition("-")[2])


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder of them, None where there is none."""
    found = _checkpoints(folder)
    return str(found[-1]) if found else None


def _begun(checkpoints: Path) -> bool:
    """Whether anything is there that a run could go on from."""
    folders = [checkpoints, *(folder for folder in checkpoints.glob("*") if folder.is_dir())]
    return any(_checkpoints(f) or (f / "stage.json").is_file() for f in folders)


def _resolve(path: Path, config: StrictModel) -> Any:
    """A config on disk with the settings that it does not say yet at their defaults."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return parse_config(type(config), raw, str(path)).model_dump(mode="json")
    except ConfigError:
        return raw


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """The plain values of a config by their dotted keys."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [_flatten(v, f"{key}.{k}" if key else str(k)) for k, v in pairs]
        return {k: v for part in inner for k, v in part.items()}
    return {key: value}
