"""A run: settings in, a folder of results out."""

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from cryoalign.app.progress import Watch
from cryoalign.app.run_folder import (
    CHECKPOINT,
    CONFIG,
    RUN_FILES,
    write_results,
    write_step,
)
from cryoalign.app.settings import HEADER, RunConfig, flat, load_config, save_config
from cryoalign.io.paths import plain
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.methods.base import OnStep, align
from cryoalign.methods.references import SEEDINGS
from cryoalign.methods.state import State
from cryoalign.particles.prepare import prepare
from cryoalign.runtime.processes import choose_device, process_group, rank, same_on_all_ranks

# What may differ between a run and its resumption: where and how fast, not what.
FREE = {
    *("output", "overwrite", "resume", "iterations", "device", "batch_size", "threads"),
    *("embedding", "max_rejected", "root", "allow_outside"),
}


REPLACED = ".replaced"  # where the results of the run before wait until there are new ones


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; says what was kept and how to go on."""


def run(
    config: RunConfig,
    *,
    console: Console | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Align as told, and write everything into the run folder.

    The folder gets the resolved ``config.yaml`` first, ``checkpoint.npz`` and ``history.csv`` after
    every iteration, and the rest (`results.RUN_FILES`) at the end. Under ``torchrun`` the processes
    share the work and process 0 writes.

    Args:
        config: the settings.
        console: where progress is shown; None is standard output.
        on_step: called after every step, when its checkpoint is written.

    Returns:
        The run folder.

    Raises:
        ValueError, OSError: what does not fit, before work starts.
        FileExistsError: ``output`` is in use, and neither overwrite nor resume is set.
        Interrupted: Ctrl-C.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with process_group(choose_device(config.device)):
        console = Console(quiet=True) if rank() else console or Console()
        stack = _read(config)
        config, state = _open_folder(config, stack)
        folder = config.output or Path()
        shown = f"{len(stack)} particles of {stack.shape[0]} x {stack.shape[1]} px -> {folder}"
        console.print(shown, highlight=False, soft_wrap=True)
        if state is not None:
            going = f"going on after iteration {state.iteration}"
            console.print(going + (", settled" if state.done else ""), highlight=False)
        with Watch(console, config.made(), state.iteration if state else 0) as watch:
            try:
                _align_and_write(config, stack, state, watch, on_step)
            except KeyboardInterrupt as stop:
                raise Interrupted(_kept(folder)) from stop
            except Exception:
                if rank() == 0 and not (folder / CHECKPOINT).exists():
                    _remove_results(folder)  # nothing was done
                    _restore(folder)
                raise
    return folder


def _align_and_write(
    config: RunConfig,
    stack: ParticleStack,
    state: State | None,
    watch: Watch,
    on_step: OnStep | None,
) -> None:
    folder, method = config.output or Path(), config.made()
    particles = prepare(
        stack,
        config.images,
        device=config.device,
        batch_size=config.batch_size,
        max_rejected=config.max_rejected,
        progress=watch.progress,
    )

    def keep(state: State) -> None:
        if rank() == 0:
            write_step(folder, method, state, particles.box)
            state.save(folder / CHECKPOINT)
            _discard_replaced(folder)
        watch.step(state)
        if on_step is not None:
            on_step(state)

    alignment = align(method, particles, resume=state, on_step=keep)
    if rank() == 0:
        watch.finishing()
        write_results(folder, config, stack, alignment)
        _discard_replaced(folder)


def _read(config: RunConfig) -> ParticleStack:
    """The particles; raises for all that headers and rows can tell."""
    stack = read_particles(config.particles, root=config.root, allow_outside=config.allow_outside)
    if stack.shape[0] == stack.shape[1]:  # `prepare` refuses other images
        config.made().check(config.images.box_of(stack.shape[0], stack.pixel_size))
    if config.references not in SEEDINGS and not Path(config.references).is_file():
        raise FileNotFoundError(
            f"references: {config.references} is neither a file nor one of {', '.join(SEEDINGS)}"
        )
    return stack


def _open_folder(config: RunConfig, stack: ParticleStack) -> tuple[RunConfig, State | None]:
    """Make the run folder ready: the resolved settings, and the checkpoint to go on from."""
    named = plain(config.output or Path("runs", f"{config.particles.stem}-{config.method}"))
    number = 1
    if rank() == 0:  # decides; the others wait below until it has
        if config.output is None:
            number = next(i for i in count(1) if not _numbered(named, i).exists())
        resolved = _resolved(config, _numbered(named, number))
        if config.overwrite:
            _refuse_own_results(resolved, stack, _numbered(named, number))
        _claim_folder(_numbered(named, number), resolved, config.resume, config.overwrite)
        save_config(_numbered(named, number) / CONFIG, resolved)
    folder = _numbered(named, int(same_on_all_ranks(torch.tensor(number))))
    checkpoint = folder / CHECKPOINT
    state = State.load(checkpoint) if config.resume and checkpoint.exists() else None
    return _resolved(config, folder), state


def _numbered(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def _resolved(config: RunConfig, output: Path) -> RunConfig:
    """With absolute paths, so that it means the same from any folder."""
    chosen = config.references in SEEDINGS
    return replace(
        config,
        particles=plain(config.particles),
        references=config.references if chosen else str(plain(Path(config.references))),
        root=None if config.root is None else plain(config.root),
        output=output,
        overwrite=False,
        resume=False,
    )


def _claim_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Create the run folder, or make sure that it may be used."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: {folder} is a file; name a folder")
    ours = _is_run_folder(folder)
    if resume and not ours:
        raise FileNotFoundError(
            f"resume: {folder} holds no {CONFIG} that a run wrote; start it without resume"
        )
    if resume:
        _refuse_other_settings(config, folder)
    elif folder.exists() and any(folder.iterdir()):
        if not ours:
            raise FileExistsError(
                f"output: {folder} holds files but no run of cryoalign; name another folder"
            )
        if not overwrite:
            raise FileExistsError(
                f"output: {folder} holds an earlier run. Go on with it (resume=true), replace it "
                "(overwrite=true), or name another folder (output=...)"
            )
        _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _is_run_folder(folder: Path) -> bool:
    try:
        with (folder / CONFIG).open(encoding="utf-8") as file:
            return file.readline().rstrip("\n") == HEADER
    except (OSError, UnicodeDecodeError):
        return False


def _refuse_other_settings(config: RunConfig, folder: Path) -> None:
    new, old = flat(config), flat(load_config(folder / CONFIG))
    changed = [
        f"{key} was {old[key]}, now {new[key]}"
        for key in new
        if key not in FREE and config.uses(key) and new[key] != old[key]
    ]
    if changed:
        raise ValueError(
            f"resume: {folder} was run with other settings:\n  " + "\n  ".join(changed) + "\n"
            "put them back, or start another run with output=..."
        )


def _refuse_own_results(config: RunConfig, stack: ParticleStack, folder: Path) -> None:
    """An input that lies among the results to be replaced would be lost."""
    results = {folder / name for name in RUN_FILES}
    inputs = [config.particles, Path(config.references), *(file.path for file in stack.files)]
    for path in inputs:
        if plain(path) in results:
            raise ValueError(
                f"overwrite: {path} is an input of this run and one of the results in {folder} "
                "that it would replace: name another folder (output=...)"
            )


def _set_aside(folder: Path) -> None:
    """Keep the results of an earlier run until the new one has some."""
    aside = folder / REPLACED
    if aside.is_dir():  # kept by a run that had none itself: those stay
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        return
    aside.mkdir()
    for name in RUN_FILES:
        if (folder / name).exists():
            (folder / name).replace(aside / name)


def _restore(folder: Path) -> None:
    """Bring back what `_set_aside` put away."""
    aside = folder / REPLACED
    if aside.is_dir():
        for path in aside.iterdir():
            path.replace(folder / path.name)
        aside.rmdir()


def _discard_replaced(folder: Path) -> None:
    if (folder / REPLACED).is_dir():
        shutil.rmtree(folder / REPLACED)


def _remove_results(folder: Path) -> None:
    """Remove what runs write, nothing else; the folder too if that empties it."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _kept(folder: Path) -> str:
    """What an interrupted run leaves, from its checkpoint: the signal may come at any moment."""
    checkpoint = folder / CHECKPOINT
    done = State.load(checkpoint).iteration if checkpoint.exists() else 0
    after = f"after iteration {done}" if done else "before the first iteration was done"
    return (
        f"stopped {after}; {folder} keeps what there is.\n"
        f"Go on with: cryoalign run {folder / CONFIG} resume=true"
    )
