"""What each way to keep hidden states costs, and how near it stays to the teacher's.

    the teacher's last hidden states -- HiddenWriter, as a capture does --> files, fidelity

Bytes are those of the files, fidelity is the report that a capture leaves in its manifest.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.cache import VectorType
from pipeline.cache.signals.chunks import CHUNK_ROWS
from pipeline.cache.signals.fidelity import Fidelity
from pipeline.cache.signals.hidden import HiddenWriter
from pipeline.cache.signals.projection import Bases
from pipeline.report.rows import ABSENT
from stages.bench.setting import Setting
from stages.hidden import HiddenConfig, make_signals

_VECTORS = 8_192
_DTYPES: tuple[VectorType, ...] = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")
_SMALL: tuple[VectorType, ...] = ("float16", "int8")
_LAYER = "layer"


@dataclass(frozen=True)
class Choice:
    """One way to keep a vector.

    Attributes:
        dtype, projection: as in a cache's config; "pca 64" has 64 components.
        bytes: per vector, scales and checksums included.
        fidelity: of the vectors.
    """

    dtype: VectorType
    projection: str
    bytes: float
    fidelity: Fidelity


def measure_choices(setting: Setting) -> list[Choice]:
    """Keep the same vectors in every way."""
    vectors = _ask(setting)
    width = vectors.shape[1]
    choices = [_measure(setting, vectors, HiddenConfig(dtype=dtype)) for dtype in _DTYPES]
    kinds = [("pca", width // 2), ("pca", width // 4), ("random", width // 4)]
    for (name, kept), dtype in product(kinds, _SMALL):
        projection = {"name": name, "width": kept}
        config = HiddenConfig.model_validate({"dtype": dtype, "projection": projection})
        choices.append(_measure(setting, vectors, config))
    return choices


def list_choices(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """As JSON values."""
    return [
        {**asdict(choice), "fidelity": choice.fidelity.model_dump(mode="json")}
        for choice in choices
    ]


def show_choices(choices: Sequence[Choice], console: Console) -> None:
    """Print one line for each choice."""
    compared = choices[0].fidelity.rows
    title = f"the teacher's last hidden states, {compared:,} vectors compared; kept: variance"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("dtype", no_wrap=True)
    table.add_column("projection", no_wrap=True)
    for heading in ("bytes", "cosine", "1 %", "MSE", "CKA", "kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice, after in zip(choices, [*choices[1:], None], strict=True):
        found, kept = choice.fidelity, choice.fidelity.explained_variance
        table.add_row(
            choice.dtype,
            choice.projection,
            f"{choice.bytes:.0f}",
            f"{found.cosine:.5f}",
            f"{found.cosine_p1:.5f}",
            f"{found.relative_mse:.1e}",
            ABSENT if found.cka is None else f"{found.cka:.5f}",
            ABSENT if kept is None else f"{100 * kept:.1f} %",
            end_section=after is None or after.projection != choice.projection,
        )
    console.print(table)


@torch.no_grad()
def _ask(setting: Setting) -> Tensor:
    """[n, D] float32, the vectors behind the logits of the first targets."""
    parts: list[Tensor] = []
    for example in setting.examples:
        batch = setting.task.batch([example], setting.tokenizer.pad_token_id or 0)
        model = setting.model
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        hidden = model.base_model(**inputs).last_hidden_state[0].float().cpu()
        parts.append(hidden[batch.target_index])
        if sum(len(part) for part in parts) >= _VECTORS:
            break
    return torch.cat(parts)[:_VECTORS]


def _measure(setting: Setting, vectors: Tensor, config: HiddenConfig) -> Choice:
    folder = setting.folder / "choice of hidden states"
    shutil.rmtree(folder, ignore_errors=True)
    signals = make_signals(config, [_LAYER], {}, vectors.shape[1])
    writer = HiddenWriter(folder / "hidden.zarr", signals, Bases(folder, signals), first=True)
    for rows in torch.split(vectors, CHUNK_ROWS):
        writer.append({_LAYER: rows})
    writer.close()
    size = sum(file.stat().st_size for file in folder.rglob("c/*/*"))
    found = config.projection
    return Choice(
        dtype=config.dtype,
        projection="" if found is None else f"{found.name} {found.width}",
        bytes=size / len(vectors),
        fidelity=writer.fidelity[_LAYER],
    )
