"""How near generated texts are to references: chrF and BLEU of a corpus, ROUGE as a mean.

hypotheses [n], references [n][any number] -> measure_texts -> {name: 0 to 100}

chrF compares characters and needs no words, so it is the one to trust where words are not divided
by spaces (Khmer, Thai, Chinese) or rich in forms. sacrebleu and rouge-score are an extra.
"""

import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from pipeline.errors import ConfigError

TextMetric = Literal["chrf", "bleu", "rouge"]
_PACKAGES = {"chrf": "sacrebleu", "bleu": "sacrebleu", "rouge": "rouge_score"}
_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}


def require_packages(metrics: Sequence[TextMetric]) -> None:
    """Refuse metrics whose package is not installed.

    Raises:
        ConfigError: names the extra to install.
    """
    for metric in metrics:
        if find_spec(_PACKAGES[metric]) is None:
            raise ConfigError(
                f"evaluate.metrics: {metric} needs {_PACKAGES[metric]}, which is not installed;"
                ' pip install "stillroom[text]"'
            )


def measure_texts(
    metrics: Sequence[TextMetric],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = "13a",
) -> dict[str, float]:
    """The metrics by name, higher is better.

    Args:
        hypotheses: [n] at least one.
        references: at least one for each.
        tokenizer: sacrebleu's, of BLEU alone.

    Returns:
        chrf: character n-gram F2 of the corpus (Popović 2015). bleu: of the corpus (Papineni et
        al. 2002; Post 2018). rouge1, rouge2, rouge_l: the mean of each text's F1, of its best
        reference (Lin 2004).
    """
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "rouge":
            found |= _rouge(hypotheses, references)
        else:
            scorer = _scorer(metric, tokenizer)
            found[metric] = float(scorer.corpus_score(list(hypotheses), _columns(references)).score)
    return found


def describe_metrics(
    metrics: Sequence[TextMetric], references: int, tokenizer: str = "13a"
) -> dict[str, str]:
    """Signatures with all that decides a score, as sacrebleu writes them."""
    described: dict[str, str] = {}
    for metric in metrics:
        if metric == "rouge":
            described[metric] = "mean F1|stemmer:no|words:Unicode letters, marks and digits"
        else:
            scorer = _scorer(metric, tokenizer)
            scorer.corpus_score(["a"], [["a"]] * references)  # its signature names their number
            described[metric] = str(scorer.get_signature())
    return described


class UnicodeWords:
    """Words of letters, marks and digits of any script, in lower case.

    rouge-score's own keep a-z and 0-9 alone: a text in Devanagari has no word for it. On English
    both give the same.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words in order."""
        kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
        return "".join(kept).split()


def _scorer(metric: TextMetric, tokenizer: str) -> Any:
    import sacrebleu

    return sacrebleu.CHRF() if metric == "chrf" else sacrebleu.BLEU(tokenize=tokenizer)


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """First references, second ones, and so on; None where a text has fewer."""
    return [list(column) for column in zip_longest(*references)]


def _rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), tokenizer=UnicodeWords())
    scores = [scorer.score_multi(r, h) for r, h in zip(references, hypotheses, strict=True)]
    return {
        name: 100.0 * float(np.mean([score[key].fmeasure for score in scores]))
        for key, name in _ROUGE.items()
    }
