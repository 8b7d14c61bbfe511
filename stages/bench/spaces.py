"""Class spaces that records are compared over: whose logits, and how sure they are.

    demo teacher, trained, sharpened, synthetic -- logits, labels --> Targets of kinds, Certainty

Trained models are read on text that they did not learn, with its own labels; synthetic logits draw
theirs. What is sharpened is a trained model whose context counts more than it learned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.targets import Targets
from pipeline.teacher.sparse import sparse_targets
from stages.bench.language import LanguageRecipe, ask_language, train_language
from stages.bench.setting import BenchConfig, Setting
from stages.bench.vocabulary import CLASSES, synthesize_logits

TEMPERATURES = (1.0, 2.0)
Labelled = tuple[Tensor, Tensor | None]  # logits [rows, V], labels [rows]
Kind = tuple[int, int]  # top k, draws


@dataclass(frozen=True)
class Certainty:
    """How sure a model is, on average over its positions.

    Attributes:
        entropy: nats; of a model that is right about its own errors, its loss per token.
        top_64, top_1: mass of the likeliest classes.
        loss: nats for each label; where labels are drawn from the logits, the entropy once more.
    """

    entropy: float
    top_64: float
    top_1: float
    loss: float


@dataclass(frozen=True)
class Space:
    """A class space and what speaks in it.

    Attributes:
        name: what the tables call it.
        classes: V.
        made: how its logits came about, in a few words.
        trained: whether they are a trained model's as it is.
        ask: yields logits [rows, V] and labels [rows], None where they are to be drawn.
    """

    name: str
    classes: int
    made: str
    trained: bool
    ask: Callable[[], Iterator[Labelled]]


Source = tuple[Space, Certainty]


def list_spaces(setting: Setting) -> list[Space]:
    """The demo teacher, the config's trained models, the last of them sharpened, synthetic ones."""
    config, positions = setting.config, setting.config.codec_targets
    classes = setting.model.config.vocab_size
    spaces = [
        Space(
            f"demo teacher, V = {classes:,}",
            classes,
            "trained for an hour on the standard library; 4 layers of width 256",
            setting.trained,
            partial(_ask_teacher, setting),
        )
    ]
    for recipe in config.languages:
        ask, classes = partial(ask_language, config.models, recipe, positions), recipe.classes
        spaces.append(Space(f"trained, V = {classes:,}", classes, _describe(recipe), True, ask))
    for recipe in config.languages[-1:]:
        name, times = f"sharpened, V = {classes:,}", config.sharpening
        made = f"the trained model, its context counted {times:g} times; not trained so"
        spaces.append(Space(name, recipe.classes, made, False, partial(ask, sharpening=times)))
    name, made = f"synthetic, V = {CLASSES:,}", "Zipf's law, bent by a made-up topic; no model"
    spaces.append(Space(name, CLASSES, made, False, partial(_synthesize, positions)))
    return spaces


def train_languages(config: BenchConfig) -> None:
    """Train the config's models unless an earlier bench has."""
    for recipe in config.languages:
        train_language(config.models, recipe)


def keep_targets(space: Space, kinds: Sequence[Kind]) -> tuple[dict[Kind, Targets], Certainty]:
    """What each kind keeps of the logits of a space, chunk by chunk; one of them 64 and more."""
    generator = torch.Generator().manual_seed(0)
    found: dict[Kind, list[Targets]] = {kind: [] for kind in kinds}
    measured = []
    for logits, known in space.ask():
        labels = _draw_labels(logits, generator) if known is None else known
        for (top_k, draws), parts in found.items():
            parts.append(sparse_targets(logits, top_k, draws, TEMPERATURES, labels, generator))
        measured.append(_measure(logits, found[max(kinds)][-1]))
    certainty = Certainty(*torch.cat(measured).mean(dim=0).tolist())
    return {kind: Targets.cat(parts) for kind, parts in found.items()}, certainty


def list_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The class spaces as JSON."""
    return [
        {
            "name": space.name,
            "classes": space.classes,
            "made": space.made,
            "trained": space.trained,
            **asdict(certainty),
        }
        for space, certainty in sources
    ]


def _describe(recipe: LanguageRecipe) -> str:
    tokens = recipe.steps * recipe.batch_size * recipe.block_size
    return (
        f"trained here on {tokens / 1e6:.1f} M tokens of Python source;"
        f" {recipe.layers} layers of width {recipe.width}"
    )


def _measure(logits: Tensor, kept: Targets) -> Tensor:
    """[rows, 4]: entropy, mass of the first 64, of the first, loss."""
    logsumexp = kept.logsumexp[:, TEMPERATURES.index(1.0)]
    probabilities = (logits - logsumexp[:, None]).exp_()
    entropy = logsumexp - torch.linalg.vecdot(probabilities, logits)
    first = (kept.logits[:, :64] - logsumexp[:, None]).exp()
    return torch.stack([entropy, first.sum(dim=1), first[:, 0], -kept.label_log_probs], dim=1)


def _ask_teacher(setting: Setting) -> Iterator[Labelled]:
    count = 0
    for example in setting.examples:
        ids = torch.from_numpy(np.asarray(example.input_ids, dtype=np.int64))[None]
        with torch.inference_mode():
            logits = setting.model(input_ids=ids.to(setting.model.device)).logits[0, :-1]
        yield logits.float().cpu(), ids[0, 1:]
        count += len(logits)
        if count >= setting.config.codec_targets:
            return


def _draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    nobody = torch.zeros(len(logits), dtype=torch.int64)
    return sparse_targets(logits, 0, 1, (1.0,), nobody, generator).draw_ids[:, 0]


def _synthesize(positions: int) -> Iterator[Labelled]:
    for logits in synthesize_logits(positions):
        yield logits, None
