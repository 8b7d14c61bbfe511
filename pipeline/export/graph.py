"""A student as an ONNX graph, and the graph as a model that is measured like any other.

    model + a batch of its task -> torch.onnx.export -> model.onnx -> onnxruntime -> GraphStudent

The graph takes what the task's batches hold, by the same names, with any number of rows and tokens:
a language model reads position ids that restart with each document, a classifier a mask. There is
no key-value cache. Needs the extra `onnx`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import ConfigError, ModelError
from pipeline.student.key_values import without_cache

FILE = "model.onnx"
_UNREAD = ("pooler_output",)  # no task here reads it or trains it
_ONE_FILE = 1_500_000_000  # bytes of weights; a protobuf ends at 2 GB

Output = Callable[[Any, Mapping[str, Tensor]], Tensor]


class GraphStudent(nn.Module):
    """An ONNX file that is called as the model it was made from; it cannot be trained.

    Args:
        folder: of `save_onnx`.
        config: the model's.

    Raises:
        ConfigError: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        super().__init__()
        require_onnx()
        import onnxruntime

        self.config = config
        self.session = onnxruntime.InferenceSession(
            folder / FILE, providers=["CPUExecutionProvider"]
        )
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # a model is on some device

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.place.device

    def get_output_embeddings(self) -> None:
        """None: a graph gives logits alone."""

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        """What the model would return, by the names of its outputs, of [B, T] inputs."""
        names = [output.name for output in self.session.get_outputs()]
        given = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
        if any(wanted.name == "token_type_ids" for wanted in self.session.get_inputs()):
            given.setdefault("token_type_ids", np.zeros_like(given["input_ids"]))
        found = self.session.run(names, given)
        return SimpleNamespace(
            **{name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
        )


class _Positional(nn.Module):
    """A model that takes its inputs in order and returns its tensors in order."""

    def __init__(
        self, model: nn.Module, inputs: list[str], outputs: list[str], extra: Sequence[Output]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs
        self.extra = extra

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, given, strict=True))
        answer = self.model(**named)
        computed = (compute(answer, named) for compute in self.extra)
        return (*(answer[name] for name in self.outputs), *computed)


def require_onnx() -> None:
    """Refuse to go on where the extra is missing.

    Raises:
        ConfigError: it is.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'onnx needs {", ".join(missing)}; pip install "stillroom[onnx]"')


def save_onnx(
    model: transformers.PreTrainedModel,
    inputs: Mapping[str, Tensor],
    folder: Path,
    extra: Mapping[str, Output] | None = None,
) -> None:
    """Write <folder>/model.onnx (with model.onnx.data beside it where it is large) and config.json.

    Args:
        model: in evaluation mode and float32, on the CPU.
        inputs: a batch as its task makes it, [B, T] each with B and T above 1; axes are dynamic.
        extra: further outputs by name, computed from what the model returns and was given.

    Raises:
        ConfigError: the extra is missing.
        ModelError: an encoder-decoder, or a model that torch cannot express as a graph.
    """
    require_onnx()
    extra = extra or {}
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__}: an encoder and a decoder need a graph each to generate, which"
            " Stillroom does not write; export it as transformers or int8"
        )
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with without_cache(model), torch.no_grad(), _quiet():
        answer = model(**inputs)
        outputs = [n for n in answer if isinstance(answer[n], Tensor) and n not in _UNREAD]
        graph = _Positional(model, list(inputs), outputs, list(extra.values())).eval()
        try:
            program = torch.onnx.export(
                graph,
                tuple(inputs.values()),
                dynamic_shapes=(tuple(axes for _ in inputs),),
                input_names=list(inputs),
                output_names=[*outputs, *extra],
                dynamo=True,
                verbose=False,
            )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            first = " ".join(str(error).split())
            raise ModelError(
                f"{type(model).__name__}: torch {torch.__version__} cannot write it as an ONNX"
                f" graph ({first[:300]}); export it as transformers or int8"
            ) from error
    assert program is not None
    size = sum(parameter.nbytes for parameter in model.parameters())
    program.save(folder / FILE, external_data=size > _ONE_FILE)
    model.config.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on its own axes, and on torchvision, which nothing here uses."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
