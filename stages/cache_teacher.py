"""Stage one: ask the teacher once and keep what it said.

    rows -> tokenizer -> examples -> teacher -> shards -> manifest.json, written last

Everything that can be wrong with the data is found before the teacher is loaded, everything that
can be wrong with the teacher before the first batch. An interrupted stage continues with the shards
that are missing; a finished one is compared with what is asked for and left as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from pipeline.cache import CacheWriter, Draft, TargetsSpec, write_head
from pipeline.cache.sharing import Shards, parse_range, read_range
from pipeline.capture import Capture
from pipeline.capture_log import CaptureLog
from pipeline.config import StrictModel, dump_config, member_of
from pipeline.examples import Example
from pipeline.locking.locks import Occupant, occupy
from pipeline.sources import DataConfig, Rows, load_rows
from pipeline.storage import Location, write_bytes, writing_folder
from pipeline.tasks import TASKS, Task
from pipeline.teacher import (
    CaptureSpec,
    Spool,
    Teacher,
    TeacherConfig,
    describe_files,
    describe_writing,
    load_settings,
    load_tokenizer,
)
from stages.asking import check_fit, find_misfit, make_spec, with_labels, with_needs
from stages.disk import count_shards, tells_of_disk
from stages.drafting import (
    continue_draft,
    make_draft,
    require_same_content,
    require_same_libraries,
    require_same_settings,
    tokenizer_identity,
)
from stages.hidden import HiddenConfig
from stages.leftovers import remove_leftovers
from stages.progress import CaptureProgress
from stages.quiet import quiet_libraries
from stages.sizes import BatchConfig, ShardConfig
from stages.writing import lets_write, write_targets


class CacheConfig(StrictModel):
    """What is asked, of whom, and what is kept.

    Attributes:
        output: the cache's folder.
        task, data, teacher: the question.
        targets, hidden: what is kept of the answer.
        batch, shard: sizes.
        seed: of the tail draws.
        on_error: what becomes of an example that the teacher cannot answer, as it is too long, has
            an unknown token, comes out as NaN or infinity, or as vectors that hidden.dtype cannot
            hold. stop: of the stage, at the first one. skip: it keeps its row without targets, and
            manifest.json says why; more than one in a hundred stop the stage.
    """

    output: Location
    task: Annotated[Task, *member_of(TASKS, "task")]
    data: DataConfig
    teacher: TeacherConfig
    targets: TargetsSpec = TargetsSpec()
    hidden: HiddenConfig = HiddenConfig()
    batch: BatchConfig = BatchConfig()
    shard: ShardConfig = ShardConfig()
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Growth:
    """What a capture has to know where it adds to a cache that stands.

    Attributes:
        choose: of the data's examples, those to ask about.
        check: refuses a draft that does not fit that cache.
        rows: the data, or what is told of it where its examples come from that cache; None loads
            it.
        gaps: ids that are not asked about, and why: the cache has no answer to them either.
        whole: whether what is added is to hold all that its task needs; that cache holds it else.
    """

    choose: Callable[[Iterable[Example]], Iterable[Example]]
    check: Callable[[Draft], None]
    rows: Rows | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)
    whole: bool = True


@quiet_libraries()
@tells_of_disk(lambda config, *args, **kwargs: (config.output, count_shards(config.output)))
def cache_teacher(
    config: CacheConfig,
    progress: bool = True,
    growth: Growth | None = None,
    share: bool = False,
    shard_range: str | None = None,
) -> Path:
    """Run the teacher over the data and return the folder of the finished cache.

    Args:
        config: what to do.
        progress: whether to say how far it is.
        growth: of a cache that stands; None makes one by itself.
        share: whether other processes may work on the same cache, if they share too: each takes
            one shard after the other that nobody has, and the last one finishes the cache.
        shard_range: which shards this process takes, as `parse_range` reads it, sharing the rest;
            the cache is finished by whoever finds that all of them stand.

    Raises:
        StillroomError: the data, teacher, settings or disk do not allow it, or another process is
            at work there (one line).
    """
    if shard_range is not None:
        read_range(shard_range)
    if growth is None or growth.whole:
        config = with_needs(config)
    output, console = config.output, Console(quiet=not progress)
    require_same_settings(config)
    rows = None if growth is None else growth.rows
    if rows is None:
        rows = load_rows(config.data)
    task = with_labels(config.task, rows)
    tokenizer = load_tokenizer(config.teacher)
    task = task.complete(load_settings(config.teacher), tokenizer)
    tell = partial(console.print, soft_wrap=True)
    shared = share or shard_range is not None
    with ExitStack() as stack:
        if not _stands(output):
            # Without a lock where it stands: a finished cache may be on a disk that is read only.
            otherwise = "start all of them with --share"
            lock = occupy(output, "cache-teacher", shared, tell, otherwise)
            here = stack.enter_context(lock)
        if _stands(output):
            manifest = require_same_content(config, task, rows, tokenizer)
            found = f"stands already, {manifest.totals.examples:,} examples"
            if shard_range is not None:
                wanted = parse_range(shard_range, manifest.num_shards)
                among = f"{wanted.start}:{wanted.stop} among them"
                found += f" in {manifest.num_shards:,} shards, {among}"
            tell(f"{output}: {found}; kept")
        else:
            _capture(config, task, rows, tokenizer, here, console, growth, shard_range)
    remove_leftovers(output)
    return output


def _stands(cache: Path) -> bool:
    """Without its config.yaml a cache is compared with the whole draft."""
    return all((cache / name).is_file() for name in ("manifest.json", "config.yaml"))


def _capture(
    config: CacheConfig,
    task: Task,
    rows: Rows,
    tokenizer: Any,
    here: Occupant,
    console: Console,
    growth: Growth | None,
    shard_range: str | None,
) -> None:
    """Ask the teacher about whatever is missing, and finish the cache if nothing is any more."""
    output = config.output
    # The file in which texts wait is written, read and removed by one process at a time.
    with here.hold("texts") if lets_write(task, config.data) else nullcontext():
        if _stands(output):
            return
        teacher: Teacher | None = None
        asked: Iterable[Mapping[str, Any]] = rows
        if growth is None or growth.rows is None:
            teacher, asked = _let_write(config, task, rows, tokenizer, console)
        examples = task.examples(asked, tokenizer, config.data.carry)
        spool = Spool.write(here.scratch, examples if growth is None else growth.choose(examples))
    try:
        teacher = teacher or _load_teacher(config, task, tokenizer)
        gaps = {} if growth is None else growth.gaps
        lenient = config.on_error == "skip"
        check_fit(teacher, task, tokenizer, spool, lenient or bool(gaps))
        spec = make_spec(config, teacher)
        draft = make_draft(config, task, rows, tokenizer, teacher, spec, spool)
        if growth is not None:
            growth.check(draft)
        path, turn = output / "capture.json", partial(here.hold, "capture")
        log = CaptureLog.read(path, describe_files(config.teacher), turn)
        with here.hold("beginning"):
            writer = _begin(config, draft, tokenizer, teacher, spec, spool, log)
        wanted = None if shard_range is None else parse_range(shard_range, draft.num_shards)
        batch_tokens, workers = config.batch.resolve(teacher)
        with CaptureProgress(console, spool, writer) as bar:
            pad_id = tokenizer.pad_token_id or 0
            Capture(
                teacher=teacher,
                examples=spool,
                writer=writer,
                make_batch=lambda examples: task.batch(examples, pad_id, config.hidden.positions),
                spec=spec,
                batch_tokens=batch_tokens,
                workers=workers,
                seed=config.seed,
                shards=Shards(writer, here, wanted),
                log=log,
                unfit=partial(find_misfit, teacher, task, gaps, lenient),
                lenient=lenient,
                progress=bar.advance,
            ).run()
        _finish(config, writer, log, here)
    finally:
        spool.close()


def _begin(
    config: CacheConfig,
    draft: Draft,
    tokenizer: Any,
    teacher: Teacher,
    spec: CaptureSpec,
    spool: Spool,
    log: CaptureLog,
) -> CacheWriter:
    """The writer, and the files that stand beside the shards, unless the cache stands already."""
    output = config.output
    writer = CacheWriter(output, continue_draft(output, draft, tokenizer, teacher, spool))
    if 0 < len(writer.finished) < writer.draft.num_shards:
        require_same_libraries(output, log)
    if not _stands(output):
        write_bytes(output / "config.yaml", dump_config(config).encode())
        with writing_folder(output / "tokenizer") as folder:
            tokenizer.save_pretrained(folder)
        if teacher.head is not None and spec.head:
            write_head(output, teacher.head)
    return writer


def _finish(config: CacheConfig, writer: CacheWriter, log: CaptureLog, here: Occupant) -> None:
    """Write index and manifest if all shards stand; of several processes one does."""
    output = config.output
    with here.hold("beginning"):  # whoever begins late must not write what is summed up now
        missing = writer.list_missing()
        if missing:
            here.tell(
                f"{output}: {len(missing)} of {writer.draft.num_shards} shards are missing, all"
                " outside --shard-range; whoever writes the last of them finishes the cache"
            )
            return
        log.save(last=True)
        here.require()
        manifest = writer.finish()
    here.tell(log.summarise(output, manifest.totals))


def _let_write(
    config: CacheConfig, task: Task, rows: Rows, tokenizer: Any, console: Console
) -> tuple[Teacher | None, Iterable[Mapping[str, Any]]]:
    """The teacher, where it writes its targets itself, and the rows with what it wrote."""
    if not lets_write(task, config.data):
        return None, rows
    teacher = _load_teacher(config, task, tokenizer)
    writes = {**teacher.identity(), "generation": describe_writing(teacher.model)}
    key = {"teacher": writes, "tokenizer": tokenizer_identity(tokenizer), "seed": config.seed}
    return teacher, write_targets(config.output, task, rows, tokenizer, teacher.model, key, console)


def _load_teacher(config: CacheConfig, task: Task, tokenizer: Any) -> Teacher:
    return Teacher.load(config.teacher, task, task.num_classes(tokenizer))
