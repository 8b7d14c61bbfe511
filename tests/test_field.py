"""How others lose or spoil a cache of a teacher, and the tests that keep this one from it.

Each entry is a bug that a published system has or had; the names are those of tests elsewhere in
this folder. Tests that belong nowhere else stand below.
"""

import ast
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from cache_examples import SIGNALS, make_draft
from loss_cases import make_targets, normal
from small_teachers import make_llama
from test_teacher import V, ask, make_example
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.cache.rows import make_schema
from pipeline.losses.divergences import ForwardKL
from pipeline.losses.tails import ask_bucket, ask_kept
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teacher import Teacher

FIELD = {
    "a writer that meets a full disk reports success, hangs, or begins from zero": [
        "test_torture.test_stages_that_are_stopped_anywhere_go_on_to_the_same_bytes",
        "test_cache_teacher_survival.test_a_failing_consumer_stops_whoever_feeds_it_without_a_hang",
        "test_cache.test_an_id_names_its_example_whatever_the_order",
    ],
    "settings of the codec that a reader must repeat by hand": [
        "test_cache.test_a_cache_describes_itself",
        "test_codecs.test_a_codec_is_its_own_configuration",
    ],
    "a temperature that is applied after the tail was cut off": [
        "test_losses_truncation"
        ".test_a_record_without_the_normaliser_of_a_temperature_cannot_be_brought_to_it",
        "test_targets.test_kept_probabilities_and_tail_mass_are_exact_at_every_cached_temperature",
    ],
    "ids that wrap in a large vocabulary": [
        "test_codecs.test_no_id_width_wraps",
        "test_teacher_sparse.test_classes_beyond_2_to_the_18_are_found_and_drawn",
    ],
    "provenance by a hash that differs in every process": [
        "test_teacher_identity.test_another_process_agrees",
        "test_sources.test_the_digest_is_the_same_in_another_process",
    ],
    "pairing by step or file number, wrong under shuffle, accumulation or a second epoch": [
        "test_stream.test_a_stream_gives_every_example_once_with_its_own_targets",
        "test_stream.test_ranks_and_workers_share_an_order_and_go_on",
        "test_training.test_cached_training_equals_training_with_the_live_teacher",
    ],
    "a file that exists taken for one that is complete": [
        "test_cache_safety.test_a_shard_with_a_file_cut_short_is_done_again",
        "test_resuming.test_a_checkpoint_that_was_cut_off_is_passed_over",
    ],
    "a verifier that cannot read the format that is shipped": [
        "test_verify.test_caches_of_every_codec_and_dtype_are_whole",
        "test_independent_reader.test_a_reader_written_from_the_page_reads_the_golden_caches",
    ],
    "a mask off by one against the targets": [
        "test_causal_lm.test_a_prompt_is_read_and_not_learned",
        "test_causal_lm.test_packed_prompts_stay_masked",
    ],
    "packing that drops rows, and lets documents see each other": [
        "test_causal_lm.test_packing_holds_every_token_of_every_document_once_and_in_order",
        "test_teacher.test_a_transformer_keeps_packed_documents_apart",
        "test_teacher.test_a_model_that_lets_packed_documents_see_one_another_is_refused",
    ],
    "means of micro-batches under gradient accumulation": [
        "test_trainer.test_gradients_do_not_depend_on_the_split_into_micro_batches",
        "test_training.test_the_evaluated_loss_of_the_training_batch_is_its_training_loss",
    ],
    "padding of minus infinity, and a tail where nothing is cut off": [
        "test_losses_padding.test_padding_of_a_short_row_changes_no_value_and_no_gradient",
        "test_targets.test_nothing_is_cut_off_where_every_class_is_kept",
    ],
    "a truncated divergence without its tail, which is none": [
        "test_field.test_a_divergence_with_its_tail_is_never_negative_and_one_without_it_is",
    ],
    "every file opened before the first step, a shard loaded or a list scanned for each item": [
        "test_cache_scale.test_a_large_cache_opens_from_a_small_manifest",
        "test_cache_scale.test_only_the_shard_of_a_row_is_looked_for",
        "test_cache_scale.test_an_id_is_found_among_many_without_their_shards",
    ],
    "columns that the trainer removes as unused": [
        "test_trainer.test_targets_survive_whatever_the_config_says_of_unused_columns",
    ],
    "a log-softmax of all tokens and classes in memory": [
        "test_field.test_no_tensor_of_a_capture_holds_all_positions_of_all_classes",
    ],
    "offsets of 32 bits in Arrow's lists": [
        "test_field.test_no_column_counts_in_32_bits",
        "test_cache.test_record_batches_stay_small_and_rows_are_found_in_all",
    ],
    "one task's shape taken for all": [
        "test_cache_teacher.test_the_loss_from_the_cache_is_the_teachers_own",
        "test_token_classification.test_what_is_cached_is_what_the_teacher_says_at_first_subwords",
        "test_question_answering.test_what_is_cached_is_what_the_teacher_says_over_the_context",
        "test_regression.test_the_cache_holds_the_teachers_outputs_bit_for_bit",
        "test_seq2seq.test_the_cache_holds_the_models_own_loss_and_hidden_states",
        "test_masked_lm.test_the_cache_holds_what_the_whole_model_says",
        "test_multi_label.test_with_every_class_kept_a_student_learns_as_from_the_live_teacher",
        "test_sentence_embeddings"
        ".test_the_cache_holds_the_vectors_that_the_teachers_folder_describes",
    ],
}


@pytest.mark.parametrize("bug", FIELD)
def test_every_bug_of_the_field_has_its_tests(bug: str) -> None:
    folder = Path(__file__).parent
    for name in FIELD[bug]:
        module, _, function = name.partition(".")
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_a_divergence_with_its_tail_is_never_negative_and_one_without_it_is() -> None:
    teacher = normal(0, 64, 500) * 3
    order = teacher.topk(8).indices
    student = teacher.scatter_add(1, order, torch.full((64, 8), 2.0, dtype=teacher.dtype))
    seen = make_targets(teacher, kept=8).at(1.0)
    divergence = ForwardKL().of_ratio
    assert ask_bucket(seen, divergence).ask(student).min() >= 0.0
    log_q = student.log_softmax(dim=1)
    log_p = teacher.log_softmax(dim=1).gather(1, order)
    bare = (log_p.exp() * (log_p - log_q.gather(1, order))).sum(dim=1)
    assert bare.min() < 0.0  # which others clamp at zero
    assert ask_kept(seen, divergence).ask(student).min() >= 0.0


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_no_tensor_of_a_capture_holds_all_positions_of_all_classes() -> None:
    teacher = Teacher(make_llama(), CausalLM(), V)
    teacher.chunk_elements = 7 * V
    with _Largest() as largest:
        ask(teacher, [make_example([60])], top_k=8)
    assert 0 < largest.elements < 59 * V


def test_no_column_counts_in_32_bits() -> None:
    columns = {"text": "string", "texts": "strings", "number": "int64"}
    schema = make_schema(make_draft(4, signals=SIGNALS, columns=columns))
    kinds = [field.type for field in schema]
    kinds += [kind.value_type for kind in kinds if pa.types.is_large_list(kind)]
    short = (pa.types.is_list, pa.types.is_string, pa.types.is_binary)
    assert not [kind for kind in kinds if any(is_short(kind) for is_short in short)]
