"""What every training command does around the loop: resolve, estimate, open or reopen the run folder, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_cli import config, console
from lowrank_cli.config import Invocation, RunConfig
from lowrank_cli.errors import FAILED, INTERRUPTED, Interrupted, LowrankError, MissingError, UsageError
from lowrank_cli.run import RunDir, versions
from lowrank_cli.train import distributed

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
    place = distributed.Place.here()
    if place is None:
        _run(command, given, method_given, call, argv, None)
        return
    world = distributed.World(place)
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
    config_file = call.config
    if folder is not None and config_file is None and call.preset is None:
        config_file = str(folder.path / "config.yaml")
    resolved = config.resolve(command, given, method_given, preset=call.preset, config_file=config_file)
    resolved = distributed.settled(resolved, world and world.place, resuming=folder is not None)
    if call.print_config:
        print(to_yaml(resolved), end="")
        return
    if call.dry_run or call.memory_budget:
        from lowrank_cli.train import dry

        estimate = dry.run(resolved, config.parse_bytes(call.memory_budget) if call.memory_budget else None)
        if call.dry_run:
            if call.json:
                print(json.dumps(estimate))
            return
    if folder is None:
        RunDir.check(call.out)
    else:
        check_same(folder, resolved)
    if world is None and resolved.train.nproc > 1:
        distributed.launch(resolved.train.nproc, list(argv))
        return
    from lowrank_cli.train.finish import summary
    from lowrank_cli.train.prepare import prepare

    placed = resolved
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
    # whatever is wrong shows here, before anything is written
    session = prepare(placed, world)

    def opened() -> RunDir:
        if folder is not None:
            console.log_to(folder.path / "log.txt")
            return folder
        made = RunDir.create(call.out, name_of(resolved))
        (made.path / "config.yaml").write_text(to_yaml(resolved), encoding="utf-8")
        return made

    result = train(session, resolved, opened() if world is None else world.share_folder(opened), start, world)
    if result:
        line = summary(result)
        print(json.dumps(result) if call.json else line)


def train(
    session: Any, resolved: RunConfig, folder: RunDir, start: Path | None, world: distributed.World | None = None
) -> dict[str, Any]:
    """Call the loop; run.json says how it ended, whatever happens."""
    common = {"command": resolved.command, "method": resolved.method, "seed": resolved.common.seed}
    folder.start(**common, resumed_from=str(start) if start else None)
    console.note(f"run {folder.path}")
    from safetensors import SafetensorError

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
    except (OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        folder.finish("failed", error=text, exit_code=FAILED)
        raise LowrankError(
            f"could not write to {folder.path}: {text}",
            f"make room, then go on with: lowrank {resolved.command} --resume {folder.path}",
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
        if call.out and not (Path(call.out) / "run.json").is_file():
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


def check_same(folder: RunDir, resolved: RunConfig) -> None:
    """A resumed run has the settings that it began with; raises UsageError listing those that differ."""
    path = folder.path / "config.yaml"
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
            f"drop those flags, or start a new run from its weights: {weights_flag(resolved)} {folder.path}",
        )


def weights_flag(resolved: RunConfig) -> str:
    """The flag of a command by which a new run takes another one's weights."""
    return "--continue-from" if resolved.command == "pretrain" else "--model"


def name_of(resolved: RunConfig) -> str:
    """pretrain-galore-llama-9m."""
    model = resolved.model.name or resolved.model.model_config or resolved.model.continue_from or "model"
    return f"{resolved.command}-{resolved.method}-{Path(model).stem if Path(model).suffix else Path(model).name}"


def to_yaml(resolved: RunConfig) -> str:
    """The configuration as config.yaml has it."""
    import yaml

    return yaml.safe_dump(resolved.flat(), sort_keys=False)
