"""Import somebody's dump: files of another tool -> an ordinary cache that says where it is from.

    files -- DumpReading --> records, all checked first -- CacheWriter --> shards -> manifest.json

Everything that can be wrong with a dump is found before a shard is written. It is read twice: to
check and count it, then to write it; an interrupted import continues with the shards that are
missing.
"""

from collections import deque
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from pipeline.cache import CacheWriter, Draft, Identity, Imported, Manifest, TargetsSpec, hash_id
from pipeline.cache.gaps import allow_skips
from pipeline.config import dump_config
from pipeline.errors import ConfigError, DataError, MismatchError, ModelError, did_you_mean
from pipeline.exchange import Facts, Findings, Space
from pipeline.identity import digest_json
from pipeline.locking.locks import Occupant, occupy
from pipeline.report.rows import format_bytes
from pipeline.runs import require_no_run
from pipeline.safe_loading import NO_CODE
from pipeline.storage import hash_file, scratch_folder, write_bytes, writing_folder
from pipeline.tasks import TASKS
from pipeline.tasks.causal_lm import CausalLM, count_ids
from pipeline.teacher import Spool
from stages.disk import count_shards, tells_of_disk
from stages.drafting import tokenizer_identity
from stages.import_reading import DumpReading, ImportConfig, list_files
from stages.progress import RowProgress
from stages.quiet import quiet_libraries


@quiet_libraries()
@tells_of_disk(lambda config, *args, **kwargs: (config.output, count_shards(config.output)))
def import_dump(config: ImportConfig, progress: bool = True) -> Path:
    """Read a dump into a cache and return its folder.

    Raises:
        StillroomError: files, tokenizer or a row of the dump do not allow it (one line).
    """
    console = Console(quiet=not progress)
    require_no_run(config.output)
    files = list_files(config.files)
    paths = [file for file, _ in files]
    dump = config.format.prepare(paths)
    tokenizer = _open_tokenizer(config.tokenizer)
    facts = dump.facts(paths)
    space = _require_tokenizer(config, facts, count_ids(tokenizer))
    reading = DumpReading(config, dump, facts, space, files, tokenizer)
    tell = partial(console.print, soft_wrap=True)
    with occupy(config.output, "import", tell=tell) as here:
        manifest = _import(config, reading, here, console)
    rows = {} if manifest.imported is None else manifest.imported.rows
    empty = f" ({rows['unanswered']:,} of them without a target)" if "unanswered" in rows else ""
    tell(
        f"{config.output}: {manifest.totals.examples:,} examples{empty},"
        f" {manifest.totals.targets:,} targets, {format_bytes(manifest.totals.bytes)}"
    )
    return config.output


def _import(
    config: ImportConfig, reading: DumpReading, here: Occupant, console: Console
) -> Manifest:
    """Check the dump, write whatever is missing, and finish the cache."""
    output, findings = config.output, Findings()
    waiting = scratch_folder(output) / "examples.arrow"
    spool = Spool.write(waiting, reading.examples(findings))
    try:
        _require_names(spool)
        draft = _make_draft(config, reading, spool, findings)
        writer = CacheWriter(output, draft)
        if not (output / "manifest.json").is_file():
            write_bytes(output / "config.yaml", dump_config(config).encode())
            with writing_folder(output / "tokenizer") as folder:
                reading.tokenizer.save_pretrained(folder)
        with RowProgress(console, "importing", len(spool)) as bar:
            _write(writer, reading, spool, bar)
        here.require()
        return writer.finish()
    finally:
        spool.close()


def _open_tokenizer(name: str) -> Any:
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ModelError(f"tokenizer: {name}: no such folder; give one, or a name on the hub")
    try:
        found = str(folder) if folder.is_dir() else name
        return AutoTokenizer.from_pretrained(found, **NO_CODE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"tokenizer: {name}: cannot be loaded ({reason}); give a folder of"
            " tokenizer files, or a name on the hub"
        ) from error


def _require_tokenizer(config: ImportConfig, facts: Facts, tokens: int) -> Space:
    """The class space of the cache.

    Raises:
        MismatchError: the dump is of another tokenizer.
    """
    name = str((facts.task or {"name": "causal-lm"}).get("name"))
    if name not in TASKS:
        raise DataError(f"the dump is of task {name!r}{did_you_mean(name, TASKS)}")
    task = TASKS[name]
    classes = facts.num_classes or tokens
    if task.vocabulary and classes != tokens:
        raise MismatchError(
            f"tokenizer: {config.tokenizer} has {tokens:,} ids, the dump {classes:,} classes; give"
            " the tokenizer that the dump was made with"
        )
    if facts.id_room is not None and facts.id_room < tokens:
        raise MismatchError(
            f"tokenizer: {config.tokenizer} has {tokens:,} ids, the dump's compression keeps ids"
            f" below {facts.id_room:,} and may have wrapped larger ones; give the tokenizer and the"
            " compression that the dump was made with"
        )
    return Space(classes, tokens, facts.shifted)


def _require_names(spool: Spool) -> None:
    """Refuse an id that stands twice, before anything is written.

    Raises:
        DataError: names it.
    """
    hashes = np.fromiter((hash_id(spool[i].example_id) for i in range(len(spool))), np.uint64)
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(twice):
        first, second = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        raise DataError(
            f"example {spool[second].example_id!r}: stands twice, as example {first} and"
            f" {second}; name a field of unique ids in format.id_field, or give files of different"
            " names"
        )


def _make_draft(
    config: ImportConfig, reading: DumpReading, spool: Spool, findings: Findings
) -> Draft:
    facts, space, dump = reading.facts, reading.space, reading.dump
    before: Any = (facts.origin or {}).get("imported") or {}  # and exported, and here again
    top_k = config.top_k or max(findings.most, 1)
    _require_room(config, top_k, space, facts, findings)
    default = CausalLM(block_size=max(2, spool.longest[1]), packing=spool.packed, overlong="refuse")
    digests = [hash_file(file) for file, _ in reading.files]
    teacher = {"name": config.teacher.model, "architecture": "unknown", "layers": 0}
    imported = Imported(
        format=dump.model_dump(mode="json", exclude_defaults=True) | {"name": dump.name},
        temperature=float(before.get("temperature", dump.temperature)),
        tail="none" if findings.tailless == findings.targets else "rest",
        not_known=[*dump.open_questions, *_list_unknown(before)],
        rows=findings.describe(),
        origin=None if facts.origin is None else dict(facts.origin),
    )
    return Draft(
        identity=Identity(
            data={"digest": digest_json(digests), "source": dump.name, "files": len(digests)},
            preprocessing={"digest": spool.digest},
            tokenizer=tokenizer_identity(reading.tokenizer),
            teacher={"digest": digest_json([teacher, imported.format]), **teacher},
        ),
        task=dict(facts.task or default.model_dump(mode="json")),
        targets=TargetsSpec(
            top_k=top_k,
            tail_draws=facts.tail_draws,
            temperatures=facts.temperatures,
            codec=config.codec,
        ).resolve(space.num_classes),
        num_classes=space.num_classes,
        shifted=facts.shifted,
        label_names=facts.label_names,
        columns=spool.columns,
        imported=imported,
        shard_examples=max(1, config.shard_tokens * len(spool) // max(1, sum(spool.lengths))),
        num_examples=len(spool),
    )


def _list_unknown(before: Any) -> list[str]:
    """What was not known of the first dump; its bounds look like any other number by now."""
    rows = before.get("rows") or {}
    bounded, labels = rows.get("labels_bounded"), rows.get("labels")
    told = f"the log-probabilities of {bounded} of {labels} labels, of which these are the highest"
    return [*before.get("not_known", []), *([f"{told} possible"] if bounded else [])]


def _require_room(
    config: ImportConfig, top_k: int, space: Space, facts: Facts, findings: Findings
) -> None:
    """Refuse a K that says more, or other things, than the rows.

    Raises:
        ConfigError: names K and what the rows hold.
    """
    rows = f"rows of {findings.least:,} to {findings.most:,} entries"
    if top_k > findings.most:
        raise ConfigError(f"top_k: {top_k:,}, but the dump has {rows}; lower it")
    if top_k > findings.least and not config.codec.short:
        raise ConfigError(
            f"codec: {config.codec.name} keeps as many entries in every row, the dump has {rows};"
            f" set codec to lossless, or top_k to {findings.least:,}"
        )
    if top_k == space.num_classes > findings.least:
        raise ConfigError(
            f"top_k: {top_k:,} are all classes, but the dump has {rows}; set it to"
            f" {top_k - 1:,} or less"
        )
    if facts.tail_draws and top_k < findings.most:
        raise ConfigError(
            f"top_k: {top_k:,} of {findings.most:,} entries, but the draws beside them stand for"
            " the rest alone; leave top_k out"
        )


def _write(writer: CacheWriter, reading: DumpReading, spool: Spool, bar: RowProgress) -> None:
    """Write the shards that do not stand yet; those that do are read past."""
    draft, sounds = writer.draft, reading.sounds(Findings())
    skipped = reading.facts.skipped
    if len(skipped) > allow_skips(draft.num_examples):  # of a view of little else
        skipped = {}
    for index in range(draft.num_shards):
        if len(writer.finished) == draft.num_shards:
            return
        first, size = index * draft.shard_examples, draft.shard_size(index)
        if index in writer.finished:
            deque(islice(sounds, size), maxlen=0)
            continue
        with writer.shard(index) as target:
            for place, (sound, columns) in enumerate(islice(sounds, size)):
                carried = {name: columns.get(name) for name in spool.columns}
                if (known := sound.example.example_id) in skipped:
                    target.skip(replace(sound.example, columns=carried), skipped[known])
                else:
                    target.add(sound.keep(draft.targets, draft.num_classes, carried))
                bar.advance(first + place + 1)
