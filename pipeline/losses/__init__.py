"""The family of losses: a member is one class that is its own configuration, and one line here."""

from pipeline.losses.attention import AttentionKL, AttentionMSE, MiniLM
from pipeline.losses.base import (
    Knowledge,
    Loss,
    Schedule,
    StudentOutputs,
    Unit,
    WarmupStableDecay,
)
from pipeline.losses.contrastive import CRD
from pipeline.losses.dense import DenseKL
from pipeline.losses.divergences import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
)
from pipeline.losses.hidden import HiddenCosine, HiddenMSE
from pipeline.losses.kept import LogitMSE, Ranking
from pipeline.losses.labels import CrossEntropy, PseudoLabel
from pipeline.losses.numbers import LabelMSE, OutputMSE
from pipeline.losses.relations import CKA, Gram, RKDAngle, RKDDistance
from pipeline.losses.uld import ULD

LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "skew_kl": SkewKL,
    "total_variation": TotalVariation,
    "dense_kl": DenseKL,
    "logit_mse": LogitMSE,
    "ranking": Ranking,
    "cross_entropy": CrossEntropy,
    "pseudo_label": PseudoLabel,
    "uld": ULD,
    "output_mse": OutputMSE,
    "label_mse": LabelMSE,
    "hidden_mse": HiddenMSE,
    "hidden_cosine": HiddenCosine,
    "rkd_distance": RKDDistance,
    "rkd_angle": RKDAngle,
    "gram": Gram,
    "cka": CKA,
    "crd": CRD,
    "minilm": MiniLM,
    "attention_mse": AttentionMSE,
    "attention_kl": AttentionKL,
}

__all__ = ["LOSSES", "Knowledge", "Loss", "Schedule", "StudentOutputs", "Unit", "WarmupStableDecay"]
