"""The whole distribution from what the teacher's head was given, and the head itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_language_cache, make_student_config, open_student
from small_teachers import make_llama, save_teacher
from small_worlds import weights
from test_masked_lm import make_masked_teacher, make_masking_tokenizer
from torch import Tensor, nn

from pipeline.cache import TeacherCache, read_head, write_head
from pipeline.errors import CacheError, ConfigError, ModelError
from pipeline.heads import OutputHead
from pipeline.losses.base import Knowledge, StudentOutputs
from pipeline.losses.dense import DenseKL
from pipeline.storage import hash_file
from pipeline.targets import UNLABELLED
from stages.cache_teacher import CacheConfig
from stages.train_student import train_student


def make_cache(root: Path, **hidden: Any) -> Path:
    """Eight classes of each target, and all of them by way of the head."""
    kept = {"head": True, "dtype": "float32", **hidden}
    return make_language_cache(root, hidden=kept, targets={"top_k": 8})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("dense"))


def test_the_cache_gives_the_logits_of_every_class(cache: Path) -> None:
    opened, model = TeacherCache.open(cache), make_llama()
    head = read_head(cache, opened.manifest.head)
    for row in (0, 5):
        example = opened[row]
        ids = torch.from_numpy(example.input_ids).long()
        lengths = example.segment_lengths.tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.inference_mode():
            own = model(ids[None], position_ids=positions, use_cache=False).logits[0, :, :300]
        picked = torch.from_numpy(example.target_positions).long()
        torch.testing.assert_close(head(example.hidden["head"]), own[picked], rtol=1e-4, atol=1e-4)


def test_a_student_learns_what_it_learns_from_every_class_kept(cache: Path, tmp_path: Path) -> None:
    whole = make_language_cache(tmp_path / "whole")
    found = []
    for folder, source, loss in (
        ("dense", cache, {"name": "dense_kl", "temperature": 2.0}),
        ("kept", whole, {"name": "forward_kl", "temperature": 2.0}),
    ):
        config = make_student_config(
            source, tmp_path / folder, losses=[loss], training={"max_steps": 6, "optim": "sgd"}
        )
        found.append(weights(open_student(train_student(config))))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_a_temperature_need_not_be_cached(cache: Path, tmp_path: Path) -> None:
    config = make_student_config(
        cache,
        tmp_path / "run",
        losses=[{"name": "dense_kl", "temperature": 3.5}, {"name": "cross_entropy"}],
        training={"max_steps": 2},
    )
    assert not any(
        "head" in name
        for name in open_student(train_student(config)).state_dict()
        if "distillation" in name
    )


def ask(student: Tensor, given: Tensor, head: OutputHead, **settings: Any) -> Tensor:
    loss = DenseKL(**settings).hear(lambda: head)
    labels = torch.full((len(student),), UNLABELLED)
    knowledge = Knowledge(None, labels, {"head": given})
    return loss.per_position(StudentOutputs(student), knowledge, loss.projections(0, 0))


def make_head(dtype: torch.dtype = torch.float64) -> tuple[OutputHead, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=dtype)
    bias = torch.randn(7, generator=generator, dtype=dtype)
    given = torch.randn(5, 4, generator=generator, dtype=dtype)
    offset = torch.randn(7, generator=generator, dtype=dtype)
    return OutputHead(weight, bias, 0.5, 3.0, 7, offset), given


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(temperature: float, reverse: bool) -> None:
    head, given = make_head()
    student = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    values = ask(student, given, head, temperature=temperature, reverse=reverse)
    p = (head(given).double() / temperature).log_softmax(1)
    q = (student[:, :7] / temperature).log_softmax(1)
    first, second = (q, p) if reverse else (p, q)
    wanted = temperature**2 * (first.exp() * (first - second)).sum(1)
    torch.testing.assert_close(values, wanted)
    factor = torch.arange(1.0, 6.0, dtype=torch.float64)
    (found,) = torch.autograd.grad((values * factor).sum(), student)
    (expected,) = torch.autograd.grad((wanted * factor).sum(), student)
    torch.testing.assert_close(found, expected)
    assert (found[:, 7:] == 0).all()  # rows that pad the student's head


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_is_lost_on_a_student_that_says_the_same(reverse: bool) -> None:
    head, given = make_head(torch.float32)
    student = head(given).requires_grad_()
    values = ask(student, given, head, reverse=reverse)
    torch.testing.assert_close(values, torch.zeros(5), atol=1e-6, rtol=0.0)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    torch.testing.assert_close(gradient, torch.zeros_like(student), atol=1e-6, rtol=0.0)


def test_a_cache_without_the_head_is_refused(tmp_path: Path) -> None:
    plain = make_language_cache(tmp_path, targets={"top_k": 8})
    config = make_student_config(plain, tmp_path / "run", losses=[{"name": "dense_kl"}])
    with pytest.raises(CacheError, match=r"keeps no output head; .* hidden\.head: true"):
        train_student(config)


def test_a_damaged_head_is_refused(cache: Path, tmp_path: Path) -> None:
    digest = TeacherCache.open(cache).manifest.head
    (tmp_path / "head.safetensors").write_bytes(
        (cache / "head.safetensors").read_bytes()[:-1] + b"x"
    )
    with pytest.raises(CacheError, match=r"head\.safetensors: is missing or damaged"):
        read_head(tmp_path, digest)


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    head, given = make_head(torch.float32)
    for told in (head, OutputHead(head.weight, None, 1.0, None, 6)):
        write_head(tmp_path, told)
        again = read_head(tmp_path, hash_file(tmp_path / "head.safetensors"))
        assert torch.equal(again(given), told(given))
        assert again.num_classes == told.num_classes


def test_one_head_has_one_file(tmp_path: Path) -> None:
    files = set()
    for _ in range(16):  # the order of metadata is drawn anew each time
        write_head(tmp_path, make_head(torch.float32)[0])
        files.add((tmp_path / "head.safetensors").read_bytes())
    assert len(files) == 1


def test_a_student_with_fewer_classes_is_refused() -> None:
    head, given = make_head()
    with pytest.raises(ModelError, match="its head has 6 classes, the teacher's 7"):
        ask(torch.zeros(5, 6, dtype=torch.float64), given, head)
    with pytest.raises(ConfigError, match="is needed at every target"):
        ask(torch.zeros(4, 7, dtype=torch.float64), given, head)


def test_what_belongs_to_every_target_is_kept_at_every_target(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set hidden\.positions to all for this task"):
        make_cache(tmp_path, positions="last")


def test_a_masked_models_transform_is_on_the_teachers_side(tmp_path: Path) -> None:
    from small_runs import make_data

    from stages.cache_teacher import cache_teacher

    save_teacher(tmp_path / "teacher", make_masked_teacher(), make_masking_tokenizer())
    config = {
        "output": str(tmp_path / "cache"),
        "task": {"name": "masked-lm", "max_length": 48},
        "data": make_data(tmp_path),
        "teacher": {"model": str(tmp_path / "teacher")},
        "targets": {"top_k": "all", "codec": "lossless"},
        "hidden": {"head": True, "positions": "labelled", "dtype": "float32"},
    }
    path = cache_teacher(CacheConfig.model_validate(config), progress=False)
    opened = TeacherCache.open(path)
    head, example = read_head(path, opened.manifest.head), opened[3]
    said = example.targets.at(1.0)
    own = head(example.hidden["head"]).log_softmax(1)
    torch.testing.assert_close(own.gather(1, said.ids), said.log_probs, rtol=1e-4, atol=1e-4)
    assert isinstance(DenseKL().projections(0, 0), nn.ModuleDict)
