"""Run a method with given settings and write a folder of results."""

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from cryoalign.app.progress import Watch
from cryoalign.app.run_folder import CHECKPOINT, CONFIG, RUN_FILES, write_results, write_step
from cryoalign.app.settings import HEADER, RunConfig, flat, load_config, save_config
from cryoalign.io.paths import plain
from cryoalign.io.stack import ParticleStack, read_particles
from cryoalign.methods.base import OnStep, align
from cryoalign.methods.references import SEEDINGS
from cryoalign.methods.state import State
from cryoalign.particles.ctf_use import ctf_line
from cryoalign.particles.prepare import prepare
from cryoalign.particles.stack import optics_of
from cryoalign.runtime.processes import choose_device, process_group, rank, same_on_all_ranks

# Settings that may change when a run is resumed, because the results do not depend on them.
FREE = {
    *("output", "overwrite", "resume", "iterations", "device", "batch_size", "threads"),
    *("embedding", "max_rejected", "root", "allow_outside", "images.cache"),
}
REPLACED = ".replaced"  # folder that keeps the results of an earlier run until there are new ones


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says what was kept and how to continue."""


def run(
    config: RunConfig, *, console: Console | None = None, on_step: OnStep | None = None
) -> Path:
    """Run the method and write all results into the run folder.

    The folder gets the resolved ``config.yaml`` first, ``checkpoint.npz`` and ``history.csv`` after
    every iteration, and the other files (`run_folder.RUN_FILES`) at the end. Under ``torchrun`` the
    processes share the work and process 0 writes the files.

    Args:
        config: the settings.
        console: where progress is shown; None is standard output.
        on_step: called after every step, when its checkpoint has been written.

    Returns:
        The run folder.

    Raises:
        ValueError, OSError: settings or input that cannot be used, before the work starts.
        FileExistsError: ``output`` is in use, and neither overwrite nor resume is set.
        Interrupted: Ctrl-C.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with process_group(choose_device(config.device)):
        console = Console(quiet=True) if rank() else console or Console()
        stack = _read(config)
        use = config.made().ctf_use(config.particle.ctf)
        optics = None if use == "none" else optics_of(stack)  # refuses CTFs that are not complete
        config, state = _open_folder(config, stack)
        folder = config.output or Path()
        shown = f"{len(stack)} particles of {stack.shape[0]} x {stack.shape[1]} px -> {folder}"
        console.print(shown, highlight=False, soft_wrap=True)
        console.print(ctf_line(use, stack, optics), highlight=False, soft_wrap=True)
        if state is not None:
            settled = ", settled" if state.done else ""
            console.print(f"continuing after iteration {state.iteration}{settled}", highlight=False)
        with Watch(console, config.made(), state.iteration if state else 0) as watch:
            try:
                _align_and_write(config, stack, state, watch, on_step)
            except KeyboardInterrupt as stop:
                raise Interrupted(_kept(folder)) from stop
            except Exception:
                if rank() == 0 and not (folder / CHECKPOINT).exists():  # no step was done
                    _remove_results(folder)
                    _restore(folder)
                raise
    return folder


def _align_and_write(
    config: RunConfig, stack: ParticleStack, state: State | None, watch: Watch,
    on_step: OnStep | None,
) -> None:  # fmt: skip
    folder, method = config.output or Path(), config.made()
    particles = prepare(
        stack,
        config.images,
        device=config.device,
        batch_size=config.batch_size,
        max_rejected=config.max_rejected,
        progress=watch.progress,
    )
    for line in filter(None, (particles.mended(), particles.kept())):
        watch.console.print(line, highlight=False, soft_wrap=True)

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
        write_results(folder, config, stack, alignment, watch.finishing)
        _discard_replaced(folder)


def _read(config: RunConfig) -> ParticleStack:
    """Open the particles, and check them and the references as far as headers and rows allow."""
    stack = read_particles(config.particles, root=config.root, allow_outside=config.allow_outside)
    method = config.made()
    if stack.shape[0] == stack.shape[1]:  # `prepare` refuses images that are not square
        method.check(config.images.box_of(stack.shape[0], stack.pixel_size))
    if config.references not in SEEDINGS and not Path(config.references).is_file():
        raise FileNotFoundError(
            f"references: {config.references} is neither a file nor one of {', '.join(SEEDINGS)}: "
            "check the path"
        )
    return stack


def _open_folder(config: RunConfig, stack: ParticleStack) -> tuple[RunConfig, State | None]:
    """Make the run folder ready; returns the resolved settings and the checkpoint, if resumed."""
    named = plain(config.output or Path("runs", f"{config.particles.stem}-{config.method}"))
    number = 1
    if rank() == 0:  # process 0 decides; the others wait below for its decision
        if config.output is None:
            number = next(i for i in count(1) if not _numbered(named, i).exists())
        folder = _numbered(named, number)
        resolved = _resolved(config, folder)
        if config.overwrite:
            _refuse_own_results(resolved, stack, folder)
        _claim_folder(folder, resolved, config.resume, config.overwrite)
        save_config(folder / CONFIG, resolved)
    folder = _numbered(named, int(same_on_all_ranks(torch.tensor(number))))
    checkpoint = folder / CHECKPOINT
    state = State.load(checkpoint) if config.resume and checkpoint.exists() else None
    return _resolved(config, folder), state


def _numbered(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder.with_name(f"{folder.name}-{number}")


def _resolved(config: RunConfig, output: Path) -> RunConfig:
    """The settings with absolute paths, so that they can be used from any folder."""
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
            f"resume: {folder} has no {CONFIG} that a run wrote; start a run without resume"
        )
    if resume:
        _refuse_other_settings(config, folder)
    elif folder.exists() and any(folder.iterdir()):
        if not ours:
            raise FileExistsError(
                f"output: {folder} has files that are not of a cryoalign run; name another folder"
            )
        if not overwrite:
            raise FileExistsError(
                f"output: {folder} has the results of an earlier run. Continue it (resume=true), "
                "replace it (overwrite=true), or name another folder (output=...)"
            )
        _keep_earlier_results(folder)
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
            "use the same settings again, or start another run with output=..."
        )


def _refuse_own_results(config: RunConfig, stack: ParticleStack, folder: Path) -> None:
    """Make sure that no input is among the results that this run would replace."""
    results = {folder / name for name in RUN_FILES}
    inputs = [config.particles, Path(config.references), *(file.path for file in stack.files)]
    for path in inputs:
        if plain(path) in results:
            raise ValueError(
                f"overwrite: {path} is an input of this run and one of the results in {folder} "
                "that this run would replace: name another folder (output=...)"
            )


def _keep_earlier_results(folder: Path) -> None:
    """Move the results of an earlier run to a folder of their own until there are new ones."""
    kept = folder / REPLACED
    if not kept.is_dir():
        kept.mkdir()
        for path in (folder / name for name in RUN_FILES):
            if path.exists():
                path.replace(kept / path.name)
    # Otherwise the last run was stopped without results: those that it had moved stay there.
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _restore(folder: Path) -> None:
    """Move back what `_keep_earlier_results` moved away."""
    kept = folder / REPLACED
    if kept.is_dir():
        for path in kept.iterdir():
            path.replace(folder / path.name)
        kept.rmdir()


def _discard_replaced(folder: Path) -> None:
    if (folder / REPLACED).is_dir():
        shutil.rmtree(folder / REPLACED)


def _remove_results(folder: Path) -> None:
    """Remove the files that runs write, and the folder if no other files are in it."""
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
        f"stopped {after}; {folder} keeps the results so far.\n"
        f"Continue with: cryoalign run {folder / CONFIG} resume=true"
    )
