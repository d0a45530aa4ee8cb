"""Check particles before any pixel is read: every row and the header of every stack.

``read_particles`` raises the problems that are found; ``cryoalign check`` lists them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cryoalign.io.formats import read_header
from cryoalign.io.images import ImageFile
from cryoalign.io.paths import resolve
from cryoalign.io.problems import InputError, Problem, row_problems
from cryoalign.io.star import StarTables, read_star

# Columns that must hold finite numbers in every row if they are present.
NUMBERS = (
    *("rlnAnglePsi", "rlnAngleRot", "rlnAngleTilt", "rlnOriginXAngst", "rlnOriginYAngst"),
    *("rlnOriginX", "rlnOriginY", "rlnClassNumber", "rlnIsFlip", "rlnOpticsGroup"),
    *("rlnDetectorPixelSize", "rlnMagnification", "rlnImagePixelSize", "rlnImageSize"),
    *("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnVoltage"),
    *("rlnSphericalAberration", "rlnAmplitudeContrast", "rlnPixelSize"),
    *("rlnCtfDataArePhaseFlipped", "rlnCtfDataAreCtfPremultiplied"),
)
PIXEL_SIZE_DIFFERS = 0.03  # share by which the pixel sizes of STAR file and header may differ
_IMAGE_NAME = re.compile(r"^([0-9]{1,12})@(.+)$")
_SAME_SCALE = (
    "run each optics group by itself, or re-extract the particles at one pixel size and box "
    "(in RELION: Extract with 'Rescale particles')"
)


@dataclass
class Survey:
    """The particles at ``path``, as far as rows and headers describe them, and all problems.

    Attributes:
        path: the input.
        star: its tables; None for a plain stack, or if the STAR file cannot be read.
        files: headers of the stacks.
        file_of: (n,) index into ``files`` of each particle.
        image_of: (n,) 0-based number of each particle's image in its file.
        pixel_size: Å per pixel; None if it is not known.
        problems: what is wrong. Use the other fields only if there are none.
        warnings: what may be wrong; the particles can be used.
    """

    path: Path
    star: StarTables | None = None
    files: tuple[ImageFile, ...] = ()
    file_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    image_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pixel_size: float | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(h, w) of the images of the first stack; None if no stack could be read."""
        return self.files[0].shape[1:] if self.files else None


def survey(path: Path, *, root: Path | None = None, allow_outside: bool = False) -> Survey:
    """Check the particles of a STAR file or stack from rows and headers; never raises.

    ``root`` and ``allow_outside`` say where stacks may be: see `read_particles`.
    """
    found = Survey(path)
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        found.problems.append(Problem(path, None, what, "check the path"))
        return found
    try:
        if path.suffix.lower() == ".star":
            found.star = read_star(path)
            _survey_star(found, root, allow_outside)
        else:
            _survey_stack(found)
    except InputError as error:
        found.problems.extend(error.problems)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        found.problems.append(Problem(path, None, what, "check its permissions"))
    return found


def _survey_stack(found: Survey) -> None:
    stack = read_header(found.path)
    found.files = (stack,)
    found.file_of = np.zeros(stack.shape[0], np.int32)
    found.image_of = np.arange(stack.shape[0])
    found.pixel_size = stack.pixel_size


def _survey_star(found: Survey, root: Path | None, allow_outside: bool) -> None:
    star = found.star
    if star is None or star.particles.empty:
        what = "lists no particles"
        found.problems.append(Problem(found.path, None, what, "give a STAR file with particles"))
        return
    for name, table in (("optics", star.optics), (star.particles_name, star.particles)):
        if table is not None:
            found.problems += _number_problems(found.path, name, table)
    if not found.problems:  # pixel sizes are computed from columns that must be numbers
        found.pixel_size, problems = _pixel_size(found.path, star)
        found.problems += problems
    _locate(found, star.particles["rlnImageName"], root, allow_outside)
    _compare_pixel_sizes(found)
    found.problems += _size_problems(found, star)


def _numbers(table: pd.DataFrame, label: str) -> np.ndarray:
    """(n,) float64 column; NaN for a cell that is not a number."""
    return pd.to_numeric(table[label], errors="coerce").to_numpy(np.float64)


def _number_problems(path: Path, block: str, table: pd.DataFrame) -> Iterator[Problem]:
    for label in (label for label in NUMBERS if label in table):
        cells = table[label].to_numpy()

        def what(row: int, label: str = label, cells: np.ndarray = cells) -> str:
            return f"{label} = '{cells[row]}' in data_{block} is not a finite number"

        rows = np.flatnonzero(~np.isfinite(_numbers(table, label)))
        yield from row_problems(path, rows, what, "correct the number or remove the row")


def _pixel_size(path: Path, star: StarTables) -> tuple[float | None, list[Problem]]:
    """Å per pixel if all rows agree; None if a file of RELION 3.0 does not give it."""
    sizes, problems = _pixel_sizes(path, star)
    needing = {"rlnOriginXAngst", "rlnOpticsGroup"} & set(star.particles)
    if sizes is None and not problems and needing:
        what = f"{' and '.join(sorted(needing))} in data_{star.particles_name}, but no data_optics"
        problems = [Problem(path, None, what, "add it, with rlnImagePixelSize")]
    if problems or sizes is None:
        return None, problems
    first = float(sizes[0])
    rows = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))
    what, remedy = "a pixel size of {:.4g} A", "correct it"
    if not len(rows):
        rows = np.flatnonzero(np.abs(sizes - first) > 1e-4 * first)
        what, remedy = f"a pixel size of {{:.4g}} A, where row 1 has {first:.4g} A", _SAME_SCALE
    if not len(rows):
        return first, []
    what = f"{what.format(sizes[rows[0]])} ({len(rows)} of {len(sizes)} rows)"
    return None, [Problem(path, int(rows[0]) + 1, what, remedy)]


def _pixel_sizes(path: Path, star: StarTables) -> tuple[np.ndarray | None, list[Problem]]:
    """(n,) pixel size of each particle; None if a file of RELION 3.0 does not give it."""
    particles, optics = star.particles, star.optics
    if optics is None:
        return _pixel_sizes_of_one_block(particles), []
    needed = [(optics, "optics", "rlnOpticsGroup"), (optics, "optics", "rlnImagePixelSize")]
    for table, name, label in [*needed, (particles, star.particles_name, "rlnOpticsGroup")]:
        if label not in table:
            what = f"data_{name} has no column {label}"
            return None, [Problem(path, None, what, "add it, or export the file again")]
    groups = _numbers(optics, "rlnOpticsGroup")
    if len(np.unique(groups)) < len(groups):
        return None, [Problem(path, None, "data_optics lists a group twice", "remove one of them")]
    size_of = dict(zip(groups, _numbers(optics, "rlnImagePixelSize"), strict=True))
    group_of = pd.Series(_numbers(particles, "rlnOpticsGroup"))
    problems = row_problems(
        path,
        np.flatnonzero(~group_of.isin(groups)),
        lambda row: f"rlnOpticsGroup {group_of[row]:g} is not in data_optics",
        "add the group to data_optics or correct the row",
    )
    return group_of.map(size_of).to_numpy(np.float64), problems


def _pixel_sizes_of_one_block(particles: pd.DataFrame) -> np.ndarray | None:
    """(n,) Å per pixel, from magnification and detector if they are given (RELION 3.0); None if
    nothing gives it."""
    if "rlnImagePixelSize" in particles:
        return _numbers(particles, "rlnImagePixelSize")
    if not {"rlnDetectorPixelSize", "rlnMagnification"} <= set(particles):
        return _numbers(particles, "rlnPixelSize") if "rlnPixelSize" in particles else None
    micrometres = _numbers(particles, "rlnDetectorPixelSize")
    with np.errstate(divide="ignore", invalid="ignore"):
        return micrometres * 1e4 / _numbers(particles, "rlnMagnification")


def _compare_pixel_sizes(found: Survey) -> None:
    """Take the pixel size of the headers if the STAR file has none; else warn if they differ."""
    sizes = [stack.pixel_size for stack in found.files]
    known = [size for size in sizes if size]
    if found.pixel_size is None:
        same = len(known) == len(sizes) and np.ptp(known or [0]) <= 1e-4 * max(known, default=0)
        if known and same and not found.problems:
            found.pixel_size = known[0]
        return
    for stack in found.files:
        size = stack.pixel_size
        if size and abs(size - found.pixel_size) > PIXEL_SIZE_DIFFERS * found.pixel_size:
            count = sum(size == other for other in sizes)
            what = (
                f"the header of {stack.path} has a pixel size of {size:.4g} A, the STAR file "
                f"{found.pixel_size:.4g} A ({count} of {len(sizes)} stacks); "
                f"{found.pixel_size:.4g} A is used"
            )
            remedy = "correct the one that is wrong: radius, resolution and CTF depend on it"
            found.warnings.append(Problem(found.path, None, what, remedy))
            return


def _locate(found: Survey, names: pd.Series, root: Path | None, allow_outside: bool) -> None:
    """Find the stack and the image of each row."""
    parts = names.str.extract(_IMAGE_NAME)  # columns 0: number, 1: stack; NaN without a match
    found.problems += row_problems(
        found.path,
        np.flatnonzero(parts[1].isna()),
        lambda row: f"rlnImageName '{names.iloc[row]}' does not name an image of a stack",
        "write it as number@stack, e.g. 000001@particles.mrcs, numbers from 1",
    )
    numbers = pd.to_numeric(parts[0]).fillna(1).to_numpy(np.int64)
    files: list[ImageFile] = []
    file_of = np.full(len(names), -1, np.int32)
    rows_of = parts[1].groupby(parts[1].to_numpy(), sort=False).indices
    for name, rows in ((name, np.asarray(rows)) for name, rows in rows_of.items()):
        try:
            stack = read_header(resolve(str(name), found.path, root, allow_outside))
        except (InputError, OSError) as error:
            found.problems += _stack_problems(found.path, rows, error)
            continue
        file_of[rows] = len(files)
        files.append(stack)
        found.problems += _index_problems(found.path, stack, rows, numbers)
    found.files, found.file_of, found.image_of = tuple(files), file_of, numbers - 1


def _index_problems(
    path: Path, stack: ImageFile, rows: np.ndarray, numbers: np.ndarray
) -> list[Problem]:
    return row_problems(
        path,
        rows[(numbers[rows] < 1) | (numbers[rows] > stack.shape[0])],
        lambda row: f"asks for image {numbers[row]} of {stack.path}",
        f"the stack has images 1 to {stack.shape[0]}: correct the row or restore the stack",
    )


def _stack_problems(path: Path, rows: np.ndarray, error: Exception) -> Iterator[Problem]:
    """The problems of a stack, reported for the first row that uses it."""
    remedy = "check the file and its permissions"
    faults = error.problems if isinstance(error, InputError) else ()
    for fault in faults or (Problem(path, None, f"cannot be read ({error})", remedy),):
        where = "" if fault.file == path else f"{fault.file}: "
        users = f" ({len(rows)} rows use it)" if len(rows) > 1 else ""
        yield Problem(path, int(rows[0]) + 1, f"{where}{fault.what}{users}", fault.remedy)


def _size_problems(found: Survey, star: StarTables) -> Iterator[Problem]:
    """Stacks whose image size differs from the first stack or from the optics table."""
    if not found.files:
        return
    shapes = [stack.shape[1:] for stack in found.files]
    height, width = shapes[0]
    has = f"{found.files[0].path} has {height} x {width}"
    for shape in dict.fromkeys(shapes):
        if shape != shapes[0]:
            first = shapes.index(shape)
            what = f"images of {found.files[first].path} are {shape[0]} x {shape[1]}, where {has}"
            what += f" ({shapes.count(shape)} of {len(shapes)} stacks)"
            yield Problem(found.path, int(np.argmax(found.file_of == first)) + 1, what, _SAME_SCALE)
    if star.optics is None or not {"rlnOpticsGroup", "rlnImageSize"} <= set(star.optics):
        return
    sizes = _numbers(star.optics, "rlnImageSize")
    used = star.optics["rlnOpticsGroup"].isin(set(star.particles.get("rlnOpticsGroup", ())))
    for row in np.flatnonzero(used.to_numpy() & np.isfinite(sizes) & (sizes != width)):
        what = f"data_optics, row {row + 1}: images of {sizes[row]:g} pixels, where {has}"
        yield Problem(found.path, None, what, "correct rlnImageSize, or " + _SAME_SCALE)
