"""Any data set becomes the same rows, and what does not fit is said in one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import parse_config
from pipeline.errors import ConfigError, DataError
from pipeline.sources import DataConfig, Labelled, load_rows
from pipeline.sources.sib200 import LANGUAGES, open_hub, open_sib200

REAL_SIB200 = os.environ.get("STILLROOM_SIB200")
TOPICS = [
    {"id": "a", "text": "Snow falls.", "label": "weather", "language": "eng"},
    {"id": "b", "text": "Goals were scored.", "label": "sports", "language": "eng"},
    {"id": "c", "text": "Es schneit.", "label": "weather", "language": "deu"},
]
PLAIN = [{"id": row["id"], "split": "train", "text": row["text"]} for row in TOPICS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.delenv("STILLROOM_SIB200", raising=False)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read(**settings: object) -> list[dict]:
    return list(load_rows(DataConfig(**settings)))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "folder"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    table = datasets.Dataset.from_list([{"id": r["id"], "text": r["text"]} for r in TOPICS])
    path = tmp_path / f"topics.{kind}"
    if kind.startswith("jsonl"):
        write_jsonl(path, table.to_list())
    elif kind == "folder":
        table.save_to_disk(path)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        getattr(table, f"to_{kind}")(str(path))
    assert read(source=str(path)) == PLAIN


def test_a_builder_reads_files_by_split_and_glob(tmp_path: Path) -> None:
    for number, row in enumerate(TOPICS):
        write_jsonl(tmp_path / f"part-{number}.jsonl", [row])
    rows = read(
        source="json",
        files={"train": str(tmp_path / "part-[01].jsonl"), "dev": [str(tmp_path / "part-2.jsonl")]},
        splits={"train": "train", "validation": "dev"},
    )
    assert [(row["id"], row["split"]) for row in rows] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "validation"),
    ]


def test_lines_of_a_text_file_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert read(source=str(tmp_path / "lines.txt")) == [
        {"id": "train-0", "split": "train", "text": "one"},
        {"id": "train-1", "split": "train", "text": "two"},
    ]


def test_options_reach_the_builder(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    rows = read(source=str(tmp_path / "lines.txt"), options={"sample_by": "document"})
    assert [row["text"] for row in rows] == ["one\ntwo\n"]


def test_a_dataset_dict_folder_keeps_its_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(TOPICS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    rows = load_rows(
        DataConfig(source=str(tmp_path / "both"), splits={"test": "test"}, carry=["language"])
    )
    assert {row["split"] for row in rows} == {"test"}
    assert [row["language"] for row in rows] == ["eng", "eng", "deu"]


def test_configurations_are_read_one_after_another_and_named(tmp_path: Path) -> None:
    folder = write_repository(tmp_path, {"eng": TOPICS[:2], "deu": TOPICS[2:]})
    rows = read(source=str(folder), name=["deu", "eng"], name_column="tongue")
    assert [(row["id"], row["tongue"]) for row in rows] == [
        ("c", "deu"),
        ("a", "eng"),
        ("b", "eng"),
    ]
    assert [row["id"] for row in read(source=str(folder), name="deu")] == ["c"]


def write_repository(folder: Path, configs: dict[str, list[dict]], split: str = "train") -> Path:
    """A folder as it lies on the hub: data files, and configurations named in its card."""
    folder = folder / "repository"
    folder.mkdir()
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}.jsonl"}]}
        for name in configs
    ]
    card = json.dumps({"configs": entries})  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    for name, rows in configs.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def test_mapped_columns_come_under_their_canonical_names(tmp_path: Path) -> None:
    rows = [{"key": 7, "sentence": "It rains.", "topic": "weather", "text": "not this one"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    mapping = {"id": "key", "text": "sentence", "label": "topic"}
    loaded = load_rows(DataConfig(source=str(path), columns=mapping, label_names=["weather"]))
    assert list(loaded) == [{"id": "7", "split": "train", "text": "It rains.", "label": 0}]


def test_chats_and_prompts_pass_untouched(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}])
    assert read(source=str(path))[0]["messages"] == chat
    path = write_jsonl(tmp_path / "prompt.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    assert read(source=str(path)) == [
        {"id": "train-0", "split": "train", "prompt": "2+2=", "completion": "4"}
    ]


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (["b", "a", None], ["a", "b"], [1, 0, None]),
        ([10, 2, None], ["2", "10"], [1, 0, None]),
        ([True, False, True], ["0", "1"], [1, 0, 1]),
    ],
)
def test_label_names_are_the_sorted_labels(
    tmp_path: Path, labels: list, names: list, found: list
) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    loaded = load_rows(DataConfig(source=str(write_jsonl(tmp_path / "x.jsonl", rows))))
    assert loaded.label_names == names
    assert [row["label"] for row in loaded] == found


def test_integer_labels_of_a_csv_with_a_gap_stay_integers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,\nc,0\n", encoding="utf-8")
    loaded = load_rows(DataConfig(source=str(tmp_path / "x.csv")))
    assert loaded.label_names == ["0", "1"]
    assert [row["label"] for row in loaded] == [1, None, 0]


def test_class_labels_bring_their_names_and_minus_one_is_unlabelled(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    loaded = load_rows(DataConfig(source=str(tmp_path / "saved")))
    assert loaded.label_names == ["no", "yes"]
    assert [row["label"] for row in loaded] == [1, None]
    turned = load_rows(DataConfig(source=str(tmp_path / "saved"), label_names=["yes", "no"]))
    assert [row["label"] for row in turned] == [0, None]


def test_integers_are_positions_among_configured_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x", "label": 1}])
    assert read(source=str(path), label_names=["no", "yes"])[0]["label"] == 1
    assert read(source=str(path), label_names=["1", "2"])[0]["label"] == 0


def test_filters_and_limits_keep_the_first_matching_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": str(i), "kind": i % 2} for i in range(10)])
    rows = read(source=str(path), where={"kind": [1]}, max_examples=2)
    assert rows == [
        {"id": "train-1", "split": "train", "text": "1"},
        {"id": "train-3", "split": "train", "text": "3"},
    ]
    assert len(read(source=str(path), max_examples={"train": 4})) == 4


def test_slices_of_a_split_are_splits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(10)])
    rows = read(source=str(path), splits={"train": "train[:80%]", "test": "train[80%:]"})
    assert [row["split"] for row in rows] == ["train"] * 8 + ["test"] * 2
    assert [row["text"] for row in rows] == [str(i) for i in range(10)]


def test_the_digest_is_the_content_in_order(tmp_path: Path) -> None:
    def digest(rows: list[dict], name: str) -> str:
        return load_rows(DataConfig(source=str(write_jsonl(tmp_path / name, rows)))).digest

    first = digest(TOPICS, "one.jsonl")
    assert digest(TOPICS, "two.jsonl") == first
    changed = [{**TOPICS[0], "text": "Snow fell."}, *TOPICS[1:]]
    assert digest(changed, "three.jsonl") != first
    assert digest(TOPICS[::-1], "four.jsonl") != first
    relabelled = [{**TOPICS[0], "label": "sports"}, *TOPICS[1:]]
    assert digest(relabelled, "five.jsonl") != first


def test_the_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TOPICS)
    program = (
        "from pipeline.sources import DataConfig, load_rows;"
        f"print(load_rows(DataConfig(source={str(path)!r})).digest)"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "other")}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == load_rows(DataConfig(source=str(path))).digest


def labelled_ids(path: Path, labelled: Labelled, **settings: object) -> set[str]:
    config = DataConfig(source=str(path), labelled=labelled, **settings)
    return {row["id"] for row in load_rows(config) if row["label"] is not None}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(12)), count=st.integers(0, 12), seed=st.integers(0, 3))
def test_who_keeps_a_label_depends_on_ids_alone(
    tmp_path: Path, order: list[int], count: int, seed: int
) -> None:
    rows = [{"id": f"s{i}", "text": f"{i}", "label": f"c{i % 3}"} for i in range(12)]
    sorted_path = write_jsonl(tmp_path / "sorted.jsonl", rows)
    mixed_path = write_jsonl(tmp_path / "mixed.jsonl", [rows[i] for i in order])
    labelled = Labelled(count=count, seed=seed)
    kept = labelled_ids(sorted_path, labelled)
    assert len(kept) == count
    assert kept == labelled_ids(mixed_path, labelled)
    assert kept <= labelled_ids(sorted_path, Labelled(count=min(count + 1, 12), seed=seed))


def test_who_keeps_a_label_is_pinned_for_ever(tmp_path: Path) -> None:
    """Teacher and student choose apart, in other processes and other years."""
    rows = [{"id": f"s{i}", "text": f"{i}", "label": "c"} for i in range(100)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert labelled_ids(path, Labelled(count=3, seed=0)) == {"s23", "s51", "s99"}
    assert labelled_ids(path, Labelled(count=3, seed=1)) == {"s15", "s54", "s72"}


def test_a_sentence_in_two_languages_is_labelled_once_and_only_where_allowed(
    tmp_path: Path,
) -> None:
    rows = [
        {"id": f"s{i}", "text": f"{language} {i}", "label": "c", "language": language}
        for language in ("eng", "deu")
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    config = DataConfig(source=str(path), carry=["language"], labelled=Labelled(count=2, seed=5))
    loaded = list(load_rows(config, unique=False))
    kept = [(row["id"], row["language"]) for row in loaded if row["label"] is not None]
    assert len(kept) == 4
    assert len({name for name, _ in kept}) == 2
    only = config.model_copy(
        update={"labelled": Labelled(count=2, seed=5, where={"language": ["eng"]})}
    )
    loaded = list(load_rows(only, unique=False))
    assert [(r["id"], r["language"]) for r in loaded if r["label"] is not None] == kept[:2]


def test_labels_are_only_withheld_from_training(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TOPICS)
    config = DataConfig(
        source="json",
        files={"train": str(path), "test": str(path)},
        splits={"train": "train", "test": "test"},
        labelled=Labelled(count=0),
    )
    loaded = load_rows(config, unique=False)
    assert [row["label"] for row in loaded] == [None, None, None, 1, 0, 1]
    assert loaded.description["counts"] == {"train": 3, "test": 3}
    assert loaded.description["labelled_rows"] == 0


BAD = {
    "missing file": (
        {"source": "{here}/topics.json"},
        r"topics\.json: no such file; did you mean 'topics\.jsonl'",
    ),
    "missing file of a builder": (
        {"source": "json", "files": "{here}/topic.jsonl"},
        r"topic\.jsonl: no such file; did you mean 'topics\.jsonl'",
    ),
    "unknown ending": ({"source": "{here}/notes.odt"}, "no builder is known for this ending"),
    "unknown split": (
        {"source": "{here}/topics.jsonl", "splits": {"test": "tset"}},
        "has no split 'tset', only train",
    ),
    "missing column": (
        {"source": "{here}/topics.jsonl", "columns": {"text": "txt"}},
        "has no column 'txt'; did you mean 'text'.*columns.text",
    ),
    "missing carried column": (
        {"source": "{here}/topics.jsonl", "carry": ["langauge"]},
        "has no column 'langauge'; did you mean 'language'",
    ),
    "label outside": (
        {"source": "{here}/topics.jsonl", "label_names": ["weather", "sport"]},
        r"row 'b' has label 'sports', which is not in label_names; did you mean 'sport'",
    ),
    "nothing left": (
        {"source": "{here}/topics.jsonl", "where": {"language": ["fra"]}},
        "`where` keeps none of its 3 rows",
    ),
    "too few labels": (
        {"source": "{here}/topics.jsonl", "labelled": {"count": 4}},
        "labelled.count is 4, but only 3",
    ),
    "broken file": ({"source": "{here}/broken.jsonl"}, r"broken\.jsonl: cannot be loaded"),
    "empty file": ({"source": "{here}/empty.jsonl"}, r"empty\.jsonl: is empty"),
    "empty csv": ({"source": "{here}/empty.csv"}, r"empty\.csv: is empty"),
    "same id twice": ({"source": "{here}/twice.jsonl"}, "id 'a' stands on more than one row"),
    "no id": ({"source": "{here}/noid.jsonl"}, "row 1 has None as its id"),
    "carried lists": (
        {"source": "{here}/lists.jsonl", "columns": {"label": "text"}, "carry": ["numbers"]},
        "column 'numbers' holds List, expected text, a list of texts or numbers",
    ),
    "unknown configuration": (
        {"source": "{here}/repository", "name": "fra"},
        "cannot be loaded .*'fra' not found. Available: .*eng",
    ),
}


@pytest.fixture
def bad_data(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "topics.jsonl", TOPICS)
    (tmp_path / "notes.odt").write_bytes(b"odt")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n{', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "empty.csv").write_text("id,text\n", encoding="utf-8")
    write_jsonl(tmp_path / "twice.jsonl", [TOPICS[0], TOPICS[1], TOPICS[0]])
    write_jsonl(tmp_path / "noid.jsonl", [TOPICS[0], {**TOPICS[1], "id": None}])
    write_jsonl(tmp_path / "lists.jsonl", [{"text": "a", "label": [1, 2], "numbers": [1]}])
    write_repository(tmp_path, {"eng": TOPICS[:2], "deu": TOPICS[2:]})
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_one_line(bad_data: Path, case: str) -> None:
    raw, message = BAD[case]
    raw = json.loads(json.dumps(raw).replace("{here}", str(bad_data)))
    with pytest.raises(DataError, match=message) as caught:
        load_rows(parse_config(DataConfig, raw, "data"))
    assert "\n" not in str(caught.value)


def test_a_builder_without_files_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="source json: needs `files`"):
        load_rows(DataConfig(source="json"))


def test_unknown_settings_and_splits_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        parse_config(DataConfig, {"source": "json", "colums": {}}, "data")
    with pytest.raises(ConfigError, match=r"splits\.dev"):
        parse_config(DataConfig, {"source": "json", "splits": {"dev": "dev"}}, "data")


def test_the_standard_library_is_a_source() -> None:
    loaded = load_rows(DataConfig(source="stdlib", splits={"test": "test"}, max_examples=3))
    rows = list(loaded)
    assert [set(row) for row in rows] == [{"id", "split", "text"}] * 3
    assert all(row["id"].endswith(".py") for row in rows)


def sib200_rows(language: str) -> list[dict]:
    return [
        {"index_id": number, "category": topic, "text": f"{language} {topic}"}
        for number, topic in enumerate(["travel", "health"])
    ]


def test_sib200_of_the_hub_is_one_table_of_languages(tmp_path: Path) -> None:
    folder = write_repository(
        tmp_path, {name: sib200_rows(name) for name in ("eng_Latn", "yor_Latn")}, "validation"
    )
    config = DataConfig(source="sib200", splits={"validation": "validation"})
    opened = open_hub(str(folder), ["eng_Latn", "yor_Latn"], config)
    table = opened.tables["validation"]
    assert table["language"][:] == ["eng_Latn"] * 2 + ["yor_Latn"] * 2
    assert {c: opened.columns[c] for c in ("id", "label")} == {
        "id": "index_id",
        "label": "category",
    }


def write_sib200(folder: Path) -> Path:
    rows = [
        {"lang": lang, "id": i, "split": split, "label": "travel", "text": f"{lang} {i}"}
        for lang in ("eng_Latn", "yor_Latn")
        for i, split in enumerate(["train", "dev", "test"])
    ]
    write_jsonl(folder / "sib200_core24.jsonl.gz", rows)
    return folder


def test_sib200_of_a_folder_is_found_by_config_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sib200(tmp_path)
    splits = {"train": "train", "validation": "validation", "test": "test"}
    rows = read(source="sib200", files=str(tmp_path), name=["yor_Latn"], splits=splits)
    assert [(r["id"], r["split"], r["language"], r["text"]) for r in rows] == [
        ("0", "train", "yor_Latn", "yor_Latn 0"),
        ("1", "validation", "yor_Latn", "yor_Latn 1"),
        ("2", "test", "yor_Latn", "yor_Latn 2"),
    ]
    monkeypatch.setenv("STILLROOM_SIB200", str(tmp_path))
    assert read(source="sib200", name="yor_Latn", splits=splits) == rows


def test_sib200_complains_about_folders_and_languages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no sib200_core24\.jsonl\.gz"):
        open_sib200(DataConfig(source="sib200", files=str(tmp_path)))
    write_sib200(tmp_path)
    with pytest.raises(DataError, match="no language 'yor_Lat'; did you mean 'yor_Latn'"):
        load_rows(DataConfig(source="sib200", files=str(tmp_path), name="yor_Lat"))


@pytest.mark.skipif(not REAL_SIB200, reason="STILLROOM_SIB200 is not set")
def test_the_real_sib200_has_the_same_sentences_in_every_language() -> None:
    folder = REAL_SIB200
    splits = {"train": "train", "validation": "validation", "test": "test"}
    loaded = load_rows(DataConfig(source="sib200", files=folder, splits=splits), unique=False)
    assert loaded.description["counts"] == {"train": 16824, "validation": 2376, "test": 4896}
    assert len(loaded.label_names or []) == 7
    by_language: dict[str, set[tuple[str, str, int]]] = {}
    for row in loaded:
        key = (row["id"], row["split"], row["label"])
        by_language.setdefault(row["language"], set()).add(key)
    assert set(by_language) == set(LANGUAGES)
    assert len(set(map(frozenset, by_language.values()))) == 1
