"""Run a training command around its loop: resolve the settings, estimate, open or reopen the run folder, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_cli import config, console
from lowrank_cli.config import RunConfig, to_yaml
from lowrank_cli.errors import FAILED, INTERRUPTED, Interrupted, LowrankError, MissingError, UsageError
from lowrank_cli.fields import parse_bytes
from lowrank_cli.lock import locked
from lowrank_cli.misfortune import explained, number_of, writing
from lowrank_cli.parallel import launch as distributed
from lowrank_cli.parallel.place import Place, settled
from lowrank_cli.run import RunDir, is_run, versions
from lowrank_cli.settings.common import Invocation
from lowrank_cli.strict_json import dumps

# settings that change neither the weights nor their order of updates, so that a resumed run may have others
FREE = {"plots", "log_every", "save_every", "keep", "log", "eval_every", "eval_tokens", "offline", "device",
        # the total batch decides the weights, up to rounding, however it is shared
        "batch_size", "nproc", "parallel", "rank_timeout"}  # fmt: skip


def run(
    command: str,
    given: dict[str, Any],
    method_given: dict[str, dict[str, Any]],
    call: Invocation,
    argv: Sequence[str] = (),
) -> None:
    """Train as the flags say, in this process, or as one of several; results on stdout if --json asks for them.

    Args:
        command: its name.
        given: flags that were typed, by field key.
        method_given: the same for the methods' own.
        call: what concerns this call only.
        argv: the arguments as they were typed, for the processes of --nproc.
    """
    place = Place.here()
    if place is None:
        _run(command, given, method_given, call, argv, None)
        return
    asked = str(given.get("rank_timeout") or "")
    world = distributed.World(place, float(asked) if asked.isdecimal() else distributed.JOIN_TIMEOUT_S)
    with world.ending():
        _run(command, given, method_given, call, argv, world)


def _run(
    command: str,
    given: dict[str, Any],
    method_given: dict[str, dict[str, Any]],
    call: Invocation,
    argv: Sequence[str],
    world: distributed.World | None,
) -> None:
    level = console.QUIET if call.quiet else console.VERBOSE if call.verbose else console.NORMAL
    (world or console).set_level(level)
    folder, start = find_resumed(call)
    began = None if folder is None else settings_of(folder, start)
    config_file = call.config
    if began is not None and config_file is None and call.preset is None:
        config_file = str(began)
    resolved = config.resolve(command, given, method_given, preset=call.preset, config_file=config_file)
    resolved = settled(resolved, world and world.place, resuming=folder is not None)
    if call.print_config:
        console.output(to_yaml(resolved).rstrip())
        return
    if call.dry_run or call.memory_budget:
        from lowrank_cli.train import dry
        from lowrank_cli.train.prepare import fitted

        estimate = dry.run(fitted(resolved), parse_bytes(call.memory_budget) if call.memory_budget else None)
        if call.dry_run:
            if call.json:
                console.output(dumps(estimate))
            return
    result: dict[str, Any] = {}
    if folder is None:
        RunDir.check(call.out)
    else:
        check_same(began, folder, resolved)
        if (result := ended(folder, start)) and world is None:
            show_ended(folder, result, call)
            return
    if world is None and resolved.train.nproc > 1:
        distributed.launch(resolved.train.nproc, list(argv))
        return
    from lowrank_cli.train.finish import summary
    from lowrank_cli.train.prepare import fitted, prepare

    placed = resolved = fitted(resolved)
    if world is not None:
        device = world.place.device(resolved.common.device)
        placed = replace(resolved, common=replace(resolved.common, device=device))
        resumed = {"resume": str(start) if start else None, "out": call.out}
        world.join(
            resolved.flat() | resumed | {"versions": versions()},
            device,
            resolved.common.seed,
            resolved.train.rank_timeout,
            sharded=resolved.train.parallel == "fsdp",
        )
        if result:
            # the others have met this process now, and may go as well
            show_ended(folder, result, call)
            return
    with ExitStack() as stack:
        if folder is not None and (world is None or world.place.rank == 0):
            stack.enter_context(locked(folder.path))
        # whatever is wrong shows here, before anything is written
        session = prepare(placed, world)

        def opened() -> RunDir:
            if folder is not None:
                console.log_to(folder.path / "log.txt")
                return folder
            made = RunDir.create(call.out, name_of(resolved))
            stack.enter_context(locked(made.path))
            with writing(made.path):
                (made.path / "config.yaml").write_text(to_yaml(resolved), encoding="utf-8")
            return made

        result = train(session, resolved, opened() if world is None else world.share_folder(opened), start, world)
    if result:
        line = summary(result)
        console.output(dumps(result) if call.json else line)


def train(
    session: Any, resolved: RunConfig, folder: RunDir, start: Path | None, world: distributed.World | None = None
) -> dict[str, Any]:
    """Call the loop; run.json says how it ended, whatever happens."""
    common = {"command": resolved.command, "method": resolved.method, "seed": resolved.common.seed}
    folder.start(**common, resumed_from=str(start) if start else None)
    console.note(f"run {folder.path}")
    try:
        from lowrank_cli.train.loop import fit

        with world.explaining() if world else nullcontext():
            result = fit(session, folder, resume=start)
    except Interrupted as stop:
        folder.finish("interrupted", error=stop.message, exit_code=INTERRUPTED)
        raise
    except KeyboardInterrupt:
        folder.finish("interrupted", error="stopped at once, without a new checkpoint", exit_code=INTERRUPTED)
        raise Interrupted(
            "stopped at once, without a new checkpoint",
            f"the newest whole one goes on with: lowrank {resolved.command} --resume {folder.path}",
        ) from None
    except LowrankError as error:
        folder.finish("failed", error=error.message, exit_code=error.exit_code)
        raise
    except Exception as error:
        known = explained(error, folder.path)
        text = known.message if known else f"{type(error).__name__}: {error}"
        folder.finish("failed", error=text, exit_code=known.exit_code if known else FAILED)
        if number_of(error) is None or known is None:
            raise
        raise LowrankError(
            known.message, f"make room, then go on with: lowrank {resolved.command} --resume {folder.path}"
        ) from None
    except BaseException as error:
        folder.finish("failed", error=f"{type(error).__name__}: {error}", exit_code=1)
        raise
    folder.finish("done", exit_code=0, result=result)
    return result


def find_resumed(call: Invocation) -> tuple[RunDir | None, Path | None]:
    """The run to go on with and its checkpoint; (None, None) for a new run.

    Raises:
        MissingError: there is no such run, or it has no checkpoint.
    """
    if call.resume == "never":
        return None, None
    if call.resume == "auto":
        if call.out and not is_run(Path(call.out)):
            return None, None
        folder = RunDir.find(call.out)
    else:
        folder = RunDir.find(call.resume)
        if call.out and Path(call.out).resolve() != folder.path.resolve():
            raise UsageError(f"--out {call.out} is not the run that --resume {call.resume} continues", "drop --out")
    named = Path(call.resume)
    if named.name.startswith("step-"):
        if not named.is_dir():
            raise MissingError(
                f"there is no checkpoint {named}", f"it may have been pruned; the newest one: --resume {folder.path}"
            )
        return folder, named
    from lowrank_cli.train import checkpoint

    found = checkpoint.newest(folder.checkpoints)
    if found is None and call.resume != "auto":
        raise MissingError(f"the run {folder.path} has no checkpoint yet", "start it again with another --out")
    return folder, found


def settings_of(folder: RunDir, start: Path | None) -> Path:
    """Return the file of a run's settings: its checkpoint's, whose checksum is kept, or the run's own."""
    own = folder.path / "config.yaml"
    return start / own.name if start is not None and (start / own.name).is_file() else own


def show_ended(folder: RunDir, result: dict[str, Any], call: Invocation) -> None:
    """Say again what a run came to that has nothing left to do."""
    from lowrank_cli.train.finish import summary

    console.note(f"the run {folder.path} has ended, and nothing is left to do")
    line = summary(result)
    console.output(dumps(result) if call.json else line)


def ended(folder: RunDir, start: Path | None) -> dict[str, Any]:
    """Return the result of a run that has ended, if its end is what would be resumed; {} otherwise."""
    from lowrank_cli.train.finish import SHOWN

    record = folder.record()
    result = record.get("result")
    if record.get("status") != "done" or not isinstance(result, dict) or start is None:
        return {}
    if not all(isinstance(result.get(key), kind) for key, kind in SHOWN.items()):
        # another program has written into run.json: the end is made again from the checkpoint
        return {}
    return result if start.name == f"step-{result['steps']:06d}" and Path(result["model"]).is_dir() else {}


def check_same(path: Path, folder: RunDir, resolved: RunConfig) -> None:
    """Raise UsageError listing the settings that a resumed run would have otherwise than it began with, in `path`."""
    # through today's defaults: a setting that came after the run is no difference
    began = config.resolve(resolved.command, {}, {}, config_file=str(path)).flat()
    wanted = resolved.flat()
    for settings in (began, wanted):
        settings["total_batch_size"] = settings["total_batch_size"] or settings["batch_size"]
    differing = [
        f"{key}: {began.get(key)} -> {wanted.get(key)}"
        for key in sorted(began | wanted)
        if key not in FREE and began.get(key) != wanted.get(key)
    ]
    if differing:
        raise UsageError(
            f"the run {folder.path} began with other settings: {'; '.join(differing)}",
            f"drop those flags (free are --{', --'.join(sorted(FREE)).replace('_', '-')}; the total batch may be "
            f"shared otherwise), or start a new run from its weights: {weights_flag(resolved)} {folder.path}",
        )


def weights_flag(resolved: RunConfig) -> str:
    """The flag of a command by which a new run takes another one's weights."""
    return "--continue-from" if resolved.command == "pretrain" else "--model"


def name_of(resolved: RunConfig) -> str:
    """pretrain-galore-llama-9m."""
    model = resolved.model.name or resolved.model.model_config or resolved.model.continue_from or "model"
    return f"{resolved.command}-{resolved.method}-{Path(model).stem if Path(model).suffix else Path(model).name}"
