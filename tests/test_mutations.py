"""One thing is changed at a time: a cache that goes on or is asked again refuses it, or it changes
nothing.

    MUTATIONS: what is changed -> the field that the refusal names, None where it is harmless

Each is tried on a finished cache, on one that was interrupted, and in a folder of its own.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_teachers import (
    TOPICS,
    make_bert,
    make_llama,
    make_rows,
    make_tokenizer,
    read_files,
    save_teacher,
    write_rows,
)
from small_words import make_bert_config, make_sentences, make_tagger
from transformers import BertForMaskedLM, BertModel

from pipeline.cache import CacheWriter, Draft, TeacherCache, digest_set, read_manifest
from pipeline.capture_log import CaptureLog, list_libraries
from pipeline.errors import CacheError, MismatchError, StillroomError
from pipeline.sentences import SentenceHead
from pipeline.targets import Targets
from stages.cache_teacher import CacheConfig, cache_teacher

COUNT = 10
TARGETS = {"top_k": 6, "tail_draws": 2, "temperatures": [1.0, 2.0], "codec": "lossless"}
SETTINGS: dict[str, dict[str, Any]] = {
    "language": {
        "task": {
            "name": "causal-lm",
            "block_size": 32,
            "packing": False,
            "overlong": "truncate",
        },
        "targets": TARGETS,
        "hidden": {"layers": [-1], "dtype": "float32"},
    },
    "topics": {
        "task": {"name": "sequence-classification", "max_length": 24},
        "targets": {"top_k": 2, "codec": "lossless"},
        "hidden": {"pooled": True},
    },
    "tags": {
        "task": {"name": "token-classification", "max_length": 32},
        "targets": {"top_k": "all", "codec": "lossless"},
    },
    "masks": {
        "task": {"name": "masked-lm", "max_length": 24},
        "targets": {"top_k": 4, "codec": "lossless"},
    },
    "sentences": {"task": {"name": "sentence-embeddings", "max_length": 24}},
}


@dataclass(frozen=True)
class World:
    """A folder with a teacher, its data, a cache that stands and one that was interrupted."""

    root: Path
    settings: dict[str, Any]

    def config(self, output: str, **changes: Any) -> CacheConfig:
        """A cache of this world; sections are changed key by key."""
        data = {"source": "json", "files": str(self.root / "rows.jsonl"), "carry": ["language"]}
        raw: dict[str, Any] = {
            "data": data,
            "teacher": {"model": str(self.root / "teacher")},
            "batch": {"tokens": 128},
            "shard": {"examples": 4},
            **self.settings,
            "output": str(self.root / output),
        }
        for section, change in changes.items():
            inner = isinstance(change, dict)
            raw[section] = {**raw.get(section, {}), **change} if inner else change
        return CacheConfig.model_validate(raw)

    def run(self, output: str, **changes: Any) -> TeacherCache:
        return TeacherCache.open(cache_teacher(self.config(output, **changes), progress=False))

    def change_rows(self, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        file = self.root / "rows.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        change(rows)
        write_rows(file, rows)

    def change_json(self, name: str, change: Callable[[Any], Any]) -> None:
        file = self.root / "teacher" / name
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """A world of each task, made once."""
    root = tmp_path_factory.mktemp("worlds")
    tokenizer = make_tokenizer(mask_token="</s>", model_max_length=64)
    marked = make_tokenizer(mask_token="</s>", cls_token="<s>", sep_token="</s>")
    torch.manual_seed(0)
    masked = BertForMaskedLM(make_bert_config(300)).eval()
    teachers = {
        "language": (make_llama(), make_tokenizer()),
        "topics": (make_bert(), marked),
        "tags": (make_tagger(), tokenizer),
        "masks": (masked, tokenizer),
        "sentences": (BertModel(make_bert_config(300)).eval(), marked),
    }
    found = {}
    for name, (model, tokens) in teachers.items():
        world = World(root / name, SETTINGS[name])
        save_teacher(world.root / "teacher", model, tokens)
        if name == "sentences":
            SentenceHead("mean").save(world.root / "teacher", 32, None)
        rows = make_sentences(COUNT) if name == "tags" else make_rows(COUNT, 16)
        write_rows(world.root / "rows.jsonl", rows)
        world.run("cache")
        _interrupt(world.root / "cache", world.root / "begun")
        found[name] = world
    return found


def _interrupt(cache: Path, begun: Path) -> None:
    """What stands of a cache when its second shard is not finished."""
    manifest = read_manifest(cache)
    CacheWriter(begun, Draft(**manifest.model_dump(include=set(Draft.model_fields))))
    shutil.copytree(cache / "shards" / "00000", begun / "shards" / "00000")
    shutil.copytree(cache / "tokenizer", begun / "tokenizer")
    for name in ("config.yaml", "capture.json", "teacher.json"):
        shutil.copy2(cache / name, begun / name)


def _move(worlds: dict[str, World], name: str, to: Path) -> World:
    """A copy elsewhere: that alone is harmless."""
    shutil.copytree(worlds[name].root, to / "moved")
    return World(to / "moved", worlds[name].settings)


# What is changed of a world; the settings that a new capture is asked with come back.


def _set(world: World, **changes: Any) -> dict[str, Any]:
    return changes


def _rows(change: Callable[[list[dict[str, Any]]], Any], world: World) -> dict[str, Any]:
    world.change_rows(change)
    return {}


def _json(name: str, change: Callable[[Any], Any], world: World) -> dict[str, Any]:
    world.change_json(name, change)
    return {}


def _swap_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def _add_token(world: World) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zq"])  # in no text
    tokenizer.save_pretrained(world.root / "teacher")
    return {}


def _add_template(world: World) -> dict[str, Any]:
    make_tokenizer(chat_template="{{ messages }}").save_pretrained(world.root / "teacher")
    return {}


def _flip_bit(world: World) -> dict[str, Any]:
    """The lowest bit of one weight."""
    file = world.root / "teacher" / "model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(torch.int32).view(-1)[7] ^= 1
    save_file(weights, file, {"format": "pt"})
    return {}


def _pool_first(world: World) -> dict[str, Any]:
    SentenceHead("cls").save(world.root / "teacher", 32, None)
    return {}


def _reorder(rows: list[dict[str, Any]]) -> None:
    rows.reverse()


def _edit(number: int, column: str, value: Any) -> Callable[[World], dict[str, Any]]:
    return partial(_rows, lambda rows: rows[number].update({column: value}))


def _setting(name: str, value: Any) -> Callable[[World], dict[str, Any]]:
    return partial(_json, "config.json", lambda content: content.update({name: value}))


def _told(section: str, **values: Any) -> Callable[[World], dict[str, Any]]:
    return partial(_set, **{section: values})


Change = Callable[[World], dict[str, Any]]
MUTATIONS: dict[str, tuple[str, Change, str | None]] = {
    # The tokenizer.
    "one token's id": (
        "language",
        partial(_json, "tokenizer.json", _swap_ids),
        r"tokenizer\.vocab",
    ),
    "one merge": ("language", partial(_json, "tokenizer.json", _swap_merges), r"tokenizer\.merges"),
    "an added token": ("language", _add_token, r"tokenizer\.added"),
    "the normaliser": (
        "language",
        partial(_json, "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        r"tokenizer\.normalizer",
    ),
    "the chat template": ("language", _add_template, r"tokenizer\.chat_template"),
    # The data.
    "one word": ("language", _edit(3, "text", "the still room"), "differs is 'row 3'"),
    "one word of a pair of tags": (
        "tags",
        _edit(3, "tokens", ["one", "two"]),
        r"data\.digest|tags",
    ),
    "one label": ("topics", _edit(2, "label", TOPICS[0]), r"data\.digest .* 'row 2'"),
    "one tag": (
        "tags",
        partial(_rows, lambda rows: rows[0]["tags"].__setitem__(0, "I-PER")),
        r"data\.digest",
    ),
    "one id": ("language", _edit(1, "id", "row one"), r"data\.digest .* 'row one'"),
    "a language": ("language", _edit(0, "language", "de"), r"data\.digest .* 'row 0'"),
    "the order of the data": ("language", partial(_rows, _reorder), r"data\.digest"),
    "a dropped example": ("topics", partial(_rows, lambda rows: rows.pop()), r"data\.counts"),
    "an example twice": (
        "topics",
        partial(_rows, lambda rows: rows.append({**rows[0], "id": "again"})),
        r"data\.counts",
    ),
    "an id twice": (
        "topics",
        partial(_rows, lambda rows: rows.append(rows[0])),
        "more than one row",
    ),
    # The teacher.
    "one bit of a weight": ("language", _flip_bit, r"teacher\.digest"),
    "one bit of an encoder": ("masks", _flip_bit, r"teacher\.digest"),
    "the norm's epsilon": (
        "language",
        _setting("rms_norm_eps", 1e-5),
        r"teacher\.config\.rms_norm",
    ),
    "the rotation's base": (
        "language",
        partial(_json, "config.json", lambda c: c["rope_parameters"].update(rope_theta=5e4)),
        r"teacher\.config\.rope_parameters\.rope_theta 10000\.0, asked for 50000\.0",
    ),
    "the activation": ("topics", _setting("hidden_act", "relu"), r"teacher\.config\.hidden_act"),
    "how a sentence is pooled": (
        "sentences",
        _pool_first,
        r"teacher\.head\.pooling mean",
    ),
    "the teacher's label order": (
        "topics",
        _setting("id2label", dict(enumerate(TOPICS[::-1]))),
        "its labels are travel",
    ),
    "the teacher's dtype": ("language", _told("teacher", dtype="bfloat16"), r"teacher\.dtype"),
    # What is kept.
    "top k": ("language", _told("targets", top_k=5), r"targets\.top_k"),
    "tail draws": ("language", _told("targets", tail_draws=3), r"targets\.tail_draws"),
    "a temperature": ("language", _told("targets", temperatures=[1, 3]), r"targets\.temperatures"),
    "the codec": ("language", _told("targets", codec="steps"), r"targets\.codec"),
    "the compression": ("topics", _told("targets", compression="lz4"), r"targets\.compression"),
    "a layer": ("language", _told("hidden", layers=[0]), r"hidden\.layers"),
    "the dtype of a layer": ("language", _told("hidden", dtype="float16"), r"hidden\.dtype"),
    "positions": ("language", _told("hidden", positions="last"), r"hidden\.positions"),
    "a projection": (
        "language",
        _told("hidden", projection={"name": "random", "width": 4}),
        r"hidden\.projection",
    ),
    "the pooled vector": ("topics", _told("hidden", pooled=False), r"hidden\.pooled"),
    "the size of a shard": ("topics", _told("shard", examples=5), r"shard\.examples"),
    "a carried column": ("topics", _told("data", carry=["language", "text"]), r"data\.carry"),
    # The question.
    "the seed of the draws": ("language", partial(_set, seed=1), "seed"),
    "the longest text": ("topics", _told("task", max_length=8), r"task\.max_length"),
    "how long texts are cut": ("language", _told("task", packing=True), r"task\.packing"),
    "the maskings": ("masks", _told("task", seed=1), r"task\.seed"),
    "the share of masks": ("masks", _told("task", probability=0.4), r"task\.probability"),
    "the label order": (
        "tags",
        _told("data", label_names=["O", "B-LOC", "B-PER", "I-PER"]),
        "label",
    ),
    # How it runs, and where things lie.
    "nothing": ("language", _set, None),
    "who wrote the teacher's settings": ("masks", _setting("transformers_version", "4.0"), None),
    "the device by name": ("masks", _told("teacher", device="cpu"), None),
    "licences": ("topics", _told("teacher", licence="mit"), None),
    "workers": ("tags", _told("batch", workers=2), None),
}
# Other batches, or other code for attention: the same numbers but for rounding.
ROUNDED: dict[str, tuple[str, Change]] = {
    "smaller batches": ("language", _told("batch", tokens=48)),
    "one example at a time": ("topics", _told("batch", tokens=1)),
    "attention without a kernel": ("language", _told("teacher", attn_implementation="eager")),
    "a classifier's attention": ("topics", _told("teacher", attn_implementation="eager")),
}


def _assert_same_targets(found: TeacherCache, expected: TeacherCache) -> None:
    """By id: the classes kept, and their probabilities up to rounding in float32.

    Who shares a batch decides how far texts are padded, and that how sums are cut; entries stand in
    an order of the shard's own. Tail draws are others, of the same distribution.
    """
    assert digest_set(found.contents) == digest_set(expected.contents)
    for example_id in expected.ids():
        one, other = found.by_id(example_id), expected.by_id(example_id)
        for temperature in expected.manifest.targets.temperatures:
            mine, theirs = (_sort_kept(e.targets, temperature) for e in (one, other))
            assert torch.equal(mine[0], theirs[0])
            torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=1e-5)
        for signal, vectors in other.hidden.items():
            torch.testing.assert_close(one.hidden[signal], vectors, rtol=1e-3, atol=1e-4)


def _sort_kept(targets: Targets, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept classes, ascending, and their probabilities."""
    at = targets.temperatures.index(temperature)
    logits = targets.logits / temperature - targets.logsumexp[:, [at]]
    ids, order = targets.ids.sort(dim=1)
    return ids, logits.exp().gather(1, order)


@pytest.mark.parametrize("change", MUTATIONS)
def test_one_change_is_refused_by_name_or_changes_nothing(
    change: str, worlds: dict[str, World], tmp_path: Path
) -> None:
    name, mutate, refusal = MUTATIONS[change]
    world = _move(worlds, name, tmp_path)
    base = read_files(worlds[name].root / "cache")
    changes = mutate(world)
    for output in ("cache", "begun"):
        if refusal is None:
            world.run(output, **changes)
            assert read_files(world.root / output) == base
            continue
        with pytest.raises(StillroomError, match=refusal) as refused:
            world.run(output, **changes)
        assert "\n" not in str(refused.value)
        left = read_files(world.root / output)
        assert {k: v for k, v in base.items() if k in left} == left
    if refusal is not None and not changes:  # what a config says is part of the manifest
        try:
            fresh = world.run("fresh", **changes)
        except StillroomError:
            return  # refused everywhere
        assert fresh.manifest.digest != read_manifest(world.root / "cache").digest


@pytest.mark.parametrize("change", ROUNDED)
def test_how_the_teacher_is_asked_changes_no_answer_but_by_rounding(
    change: str, worlds: dict[str, World], tmp_path: Path
) -> None:
    name, mutate = ROUNDED[change]
    world = _move(worlds, name, tmp_path)
    expected = TeacherCache.open(worlds[name].root / "cache")
    for output in ("cache", "begun"):
        changes = mutate(world)
        _assert_same_targets(world.run(output, **changes), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_data_in_another_order_have_the_same_targets_by_id(
    name: str, worlds: dict[str, World], tmp_path: Path
) -> None:
    world = _move(worlds, name, tmp_path)
    world.change_rows(_reorder)
    reordered = world.run("reordered")
    expected = TeacherCache.open(worlds[name].root / "cache")
    assert list(reordered.ids()) == list(expected.ids())[::-1]
    _assert_same_targets(reordered, expected)
    with pytest.raises(MismatchError, match=r"data\.digest"):
        world.run("cache")


def test_a_capture_goes_on_with_the_libraries_that_it_was_begun_with(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    world = _move(worlds, "language", tmp_path)
    log = CaptureLog.read(world.root / "begun" / "capture.json")
    libraries = log.sessions[-1]["libraries"]
    assert libraries == list_libraries()
    log.sessions[-1]["libraries"] = {**libraries, "torch": "1.13.1"}
    log.save()
    with pytest.raises(MismatchError, match=r"cached with torch 1\.13, asked for .* Install those"):
        world.run("begun")
    patched = ".".join([*libraries["transformers"].split(".")[:2], "99"])
    log.sessions[-1]["libraries"] = {**libraries, "transformers": patched}
    log.save()
    world.run("begun")
    assert read_files(world.root / "begun") == read_files(worlds["language"].root / "cache")


def test_a_cache_without_its_config_is_compared_as_a_whole(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    world = _move(worlds, "topics", tmp_path)
    base = read_files(world.root / "cache")
    stored = world.root / "cache" / "config.yaml"
    stored.write_text("task: [", encoding="utf-8")
    with pytest.raises(CacheError, match=r"config\.yaml: cannot be read .*; remove it, and"):
        world.run("cache")
    stored.unlink()
    with pytest.raises(MismatchError, match=r"targets\.top_k 2, asked for 1"):
        world.run("cache", targets={"top_k": 1})
    world.run("cache")
    assert read_files(world.root / "cache") == base
    assert stored.is_file()
