"""Another layer or temperature for a cache that stands: asked of its own examples alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_language_cache, make_student_config, make_topic_cache, open_student
from small_teachers import make_bert, save_teacher
from test_sentence_embeddings import make_cache as make_sentence_cache
from test_sentence_embeddings import make_encoder

from pipeline.cache import TeacherCache
from pipeline.cache.sizes import column_bytes
from pipeline.errors import ConfigError, MismatchError
from stages.add_signal import add_signal
from stages.select import Choice, select
from stages.train_student import train_student


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of topics with its last layer, in codes; its data set is gone."""
    root = tmp_path_factory.mktemp("topics")
    targets = {"top_k": 2, "temperatures": [1.0, 2.0]}
    hidden = {"layers": [-1], "dtype": "float32"}
    make_topic_cache(root, targets=targets, hidden=hidden)
    for file in root.glob("*.jsonl"):
        file.unlink()
    return root


def assert_keeps(view: TeacherCache, cache: TeacherCache, targets: bool = True) -> None:
    """All that the cache says is said by the view too."""
    assert list(view.ids()) == list(cache.ids())
    assert list(view.split_indices("test")) == list(cache.split_indices("test"))
    for row in range(len(cache)):
        ours, theirs = view[row], cache[row]
        assert dict(ours.columns) == dict(theirs.columns)
        for name in cache.manifest.signals:
            assert torch.equal(ours.hidden[name], theirs.hidden[name])
        for temperature in cache.manifest.targets.temperatures:
            one, other = (e.targets.at(temperature) for e in (ours, theirs))
            if targets:
                assert torch.equal(one.log_probs, other.log_probs)
            order, again = one.ids.argsort(dim=1), other.ids.argsort(dim=1)
            torch.testing.assert_close(
                one.log_probs.gather(1, order), other.log_probs.gather(1, again)
            )


def test_a_layer_is_added_without_the_data(shelf: Path, tmp_path: Path) -> None:
    before = {f: f.read_bytes() for f in (shelf / "cache").rglob("*") if f.is_file()}
    cache = TeacherCache.open(shelf / "cache")
    view = add_signal(
        cache.path, tmp_path / "more", ["hidden.layers=[1]", "hidden.pooled=true"], progress=False
    )
    assert {f: f.read_bytes() for f in before} == before
    assert set(view.manifest.signals) == {"layer.2", "layer.1", "pooled"}
    assert view.manifest.targets == cache.manifest.targets
    assert_keeps(view, cache)
    teacher = make_bert()
    for row in (0, 7, 29):
        ids = torch.from_numpy(cache[row].input_ids).long()[None]
        with torch.no_grad():
            states = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        found = view[row].hidden
        torch.testing.assert_close(found["layer.1"], states[1][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["pooled"], states[2].mean(1), rtol=1e-4, atol=1e-5)
    run = train_student(
        make_student_config(
            view.path,
            tmp_path / "student",
            student={"from": "scratch", "architecture": "bert", "layers": 1, "hidden_size": 16,
                     "heads": 2, "intermediate_size": 24},
            losses=[{"name": "forward_kl"}, {"name": "hidden_mse", "layers": {1: 1}}],
        )
    )  # fmt: skip
    assert (run / "result.json").is_file()


def test_what_an_overlay_says_of_targets_is_little(shelf: Path, tmp_path: Path) -> None:
    view = add_signal(shelf / "cache", tmp_path / "more", ["hidden.layers=[1]"], progress=False)
    (overlay,) = view.parts[0].overlays
    assert overlay.cache.manifest.layout.top_k == 1
    assert overlay.cache.manifest.columns == {}
    sizes = column_bytes(overlay.cache)
    assert not {"logit_0", "draw_gap_0", "text"} & set(sizes)


def test_a_temperature_is_added_to_those_that_stand(shelf: Path, tmp_path: Path) -> None:
    cache = TeacherCache.open(shelf / "cache")
    asked = ["targets.temperatures=[4]", "hidden.layers=[1]"]
    view = add_signal(cache.path, tmp_path / "hotter", asked, progress=False)
    assert view.manifest.targets.temperatures == (1.0, 2.0, 4.0)
    assert_keeps(view, cache, targets=False)
    logits = make_bert()(input_ids=torch.from_numpy(cache[3].input_ids).long()[None]).logits
    hot = (logits / 4).log_softmax(-1).topk(2)
    found = view[3].targets.at(4.0)
    assert set(found.ids[0].tolist()) == set(hot.indices[0].tolist())
    torch.testing.assert_close(found.log_probs[0].max(), hot.values[0, 0], atol=0.02, rtol=0)
    train_student(
        make_student_config(
            view.path,
            tmp_path / "student",
            student={"from": "scratch", "architecture": "bert", "layers": 1, "hidden_size": 16,
                     "heads": 2, "intermediate_size": 24},
            losses=[{"name": "forward_kl", "temperature": 4.0}],
        )
    )  # fmt: skip


def test_the_head_is_added_to_a_language_model(tmp_path: Path) -> None:
    targets = {"top_k": 4, "temperatures": [1.0]}
    make_language_cache(tmp_path, targets=targets, hidden={"layers": [0], "dtype": "float32"})
    cache = TeacherCache.open(tmp_path / "cache")
    view = add_signal(cache.path, tmp_path / "more", ["hidden.head=true"], progress=False)
    example = view[2]
    logits = view.read_head()(example.hidden["head"])
    best = example.targets.first_choice()[0]
    assert torch.equal(logits.argmax(dim=1), best)
    losses = [{"name": "dense_kl"}]
    run = train_student(make_student_config(view.path, tmp_path / "student", losses=losses))
    assert open_student(run).config.num_hidden_layers == 1


def test_a_layer_is_added_to_vectors_of_sentences(tmp_path: Path) -> None:
    make_encoder(tmp_path / "teacher")
    cache = TeacherCache.open(make_sentence_cache(tmp_path))
    view = add_signal(cache.path, tmp_path / "more", ["hidden.layers=[1]"], progress=False)
    assert set(view.manifest.signals) == {"pooled", "layer.1"}
    assert set(TeacherCache.open(tmp_path / "more" / "added").manifest.signals) == {"layer.1"}
    assert_keeps(view, cache)
    assert all(len(view[row].hidden["layer.1"]) == len(view[row].input_ids) for row in range(9))
    with pytest.raises(ConfigError, match="holds pooled already"):
        add_signal(cache.path, tmp_path / "again", ["hidden.pooled=true"], progress=False)


def test_a_view_of_views_keeps_what_was_added(shelf: Path, tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"progress": False}
    select(shelf / "cache", tmp_path / "half", Choice(every=2))
    add_signal(tmp_path / "half", tmp_path / "deep", ["hidden.layers=[1]"], **quiet)
    view = add_signal(tmp_path / "deep", tmp_path / "deeper", ["hidden.layers=[0]"], **quiet)
    assert [s.cache.path.parent.name for s in view.parts[0].overlays] == ["deep", "deeper"]
    select(view.path, tmp_path / "few", Choice(every=4))
    few, cache = TeacherCache.open(tmp_path / "few"), TeacherCache.open(shelf / "cache")
    for at, row in enumerate(range(0, len(cache), 8)):
        assert few[at].example_id == cache[row].example_id
        assert set(few[at].hidden) == {"layer.0", "layer.1", "layer.2"}
        assert torch.equal(few[at].hidden["layer.0"], view[row // 2].hidden["layer.0"])
        assert torch.equal(few[at].hidden["layer.2"], cache[row].hidden["layer.2"])


def test_a_view_that_was_not_written_is_written_without_asking_again(
    shelf: Path, tmp_path: Path
) -> None:
    view = add_signal(shelf / "cache", tmp_path / "more", ["hidden.layers=[1]"], progress=False)
    files = {f: f.read_bytes() for f in view.path.rglob("*") if f.is_file()}
    (view.path / "view.json").unlink()
    add_signal(shelf / "cache", tmp_path / "more", ["hidden.layers=[1]"], progress=False)
    assert {f: f.read_bytes() for f in view.path.rglob("*") if f.is_file()} == files


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (["hidden.layers=[2]"], r"holds layer\.2 already"),
        (["hidden.dtype=float16"], "nothing is added"),
        (["targets.temperatures=[2]"], "holds T = 1, 2 already; add another temperature"),
        (["targets.top_k=3", "hidden.layers=[1]"], r"targets\.top_k=3: cannot be added"),
        (["data.carry=[text]"], r"data\.carry=\[text\]: cannot be added"),
    ],
)
def test_what_cannot_be_added_is_refused(
    shelf: Path, tmp_path: Path, asked: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        add_signal(shelf / "cache", tmp_path / "more", asked, progress=False)
    assert not (tmp_path / "more" / "view.json").exists()


def test_a_teacher_that_learned_since_is_refused(shelf: Path, tmp_path: Path) -> None:
    changed = make_bert()
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-3
    save_teacher(tmp_path / "teacher", changed)
    asked = ["hidden.layers=[1]", f"teacher.model={tmp_path / 'teacher'}"]
    with pytest.raises(MismatchError, match=r"teacher\.digest"):
        add_signal(shelf / "cache", tmp_path / "more", asked, progress=False)


def test_code_of_a_teacher_runs_only_where_the_user_says_so(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "cache", tmp_path / "cache")
    file = tmp_path / "cache" / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert file.read_text() != text
    view = add_signal(tmp_path / "cache", tmp_path / "more", ["hidden.layers=[1]"], progress=False)
    assert "trust_remote_code: false" in (view.path / "added" / "config.yaml").read_text()
