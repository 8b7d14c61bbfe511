"""The tasks a teacher can be asked and a student can learn: one class and one line each."""

from pipeline.scores import Observation, Scores
from pipeline.tasks.base import Batch, Task
from pipeline.tasks.causal_lm import CausalLM
from pipeline.tasks.masked_lm import MaskedLM
from pipeline.tasks.multi_label import MultiLabelClassification
from pipeline.tasks.question_answering import QuestionAnswering
from pipeline.tasks.sentence_embeddings import SentenceEmbeddings
from pipeline.tasks.seq2seq import Seq2Seq
from pipeline.tasks.sequence_classification import SequenceClassification
from pipeline.tasks.sequence_regression import SequenceRegression
from pipeline.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "multi-label-classification": MultiLabelClassification,
    "question-answering": QuestionAnswering,
    "sentence-embeddings": SentenceEmbeddings,
    "seq2seq": Seq2Seq,
    "sequence-classification": SequenceClassification,
    "sequence-regression": SequenceRegression,
    "token-classification": TokenClassification,
}

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "MaskedLM",
    "MultiLabelClassification",
    "Observation",
    "QuestionAnswering",
    "Scores",
    "SentenceEmbeddings",
    "Seq2Seq",
    "SequenceClassification",
    "SequenceRegression",
    "Task",
    "TokenClassification",
]
