"""Check particles before any pixel is read: every row and the header of every stack.

``read_particles`` raises the problems that are found; ``cryoalign check`` lists them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cryoalign.io.formats import read_header
from cryoalign.io.images import ImageFile
from cryoalign.io.paths import resolve
from cryoalign.io.problems import InputError, Problem, row_problems
from cryoalign.io.star import StarTable, StarTables, read_star

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
_IMAGE_NAME = "^(?P<number>[0-9]{1,12})@(?P<stack>.+)$"
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
    if star is None or not len(star.table):
        what = "lists no particles"
        found.problems.append(Problem(found.path, None, what, "give a STAR file with particles"))
        return
    for name, table in (("optics", star.optics_table), (star.particles_name, star.table)):
        if table is not None:
            found.problems += _number_problems(found.path, name, table)
    if not found.problems:  # pixel sizes are computed from columns that must be numbers
        found.pixel_size, problems = _pixel_size(found.path, star)
        found.problems += problems
    _locate(found, star.table.text("rlnImageName"), root, allow_outside)
    _compare_pixel_sizes(found)
    _find_duplicates(found)
    found.problems += _size_problems(found, star)


def _number_problems(path: Path, block: str, table: StarTable) -> Iterator[Problem]:
    for label in (label for label in NUMBERS if label in table):

        def what(row: int, label: str = label) -> str:
            return f"{label} = '{table.cell(row, label)}' in data_{block} is not a finite number"

        rows = np.flatnonzero(~np.isfinite(table.numbers(label)))
        yield from row_problems(path, rows, what, "correct the number or remove the row")


def _pixel_size(path: Path, star: StarTables) -> tuple[float | None, list[Problem]]:
    """Å per pixel if all rows agree; None if a file of RELION 3.0 does not give it."""
    sizes, problems = _pixel_sizes(path, star)
    needing = {"rlnOriginXAngst", "rlnOpticsGroup"} & set(star.table.labels)
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
    particles, optics = star.table, star.optics_table
    if optics is None:
        return _pixel_sizes_of_one_block(particles), []
    needed = [(optics, "optics", "rlnOpticsGroup"), (optics, "optics", "rlnImagePixelSize")]
    for table, name, label in [*needed, (particles, star.particles_name, "rlnOpticsGroup")]:
        if label not in table:
            what = f"data_{name} has no column {label}"
            return None, [Problem(path, None, what, "add it, or export the file again")]
    groups, group_of = optics.numbers("rlnOpticsGroup"), particles.numbers("rlnOpticsGroup")
    order = groups.argsort()
    if len(np.unique(groups)) < len(groups):
        return None, [Problem(path, None, "data_optics lists a group twice", "remove one of them")]
    problems = row_problems(
        path,
        np.flatnonzero(~np.isin(group_of, groups)),
        lambda row: f"rlnOpticsGroup {group_of[row]:g} is not in data_optics",
        "add the group to data_optics or correct the row",
    )
    place = order[np.searchsorted(groups[order], group_of).clip(max=len(groups) - 1)]
    return optics.numbers("rlnImagePixelSize")[place], problems


def _pixel_sizes_of_one_block(particles: StarTable) -> np.ndarray | None:
    """(n,) Å per pixel, from magnification and detector if they are given (RELION 3.0); None if
    nothing gives it."""
    if "rlnImagePixelSize" in particles:
        return particles.numbers("rlnImagePixelSize")
    if not {"rlnDetectorPixelSize", "rlnMagnification"} <= set(particles.labels):
        return particles.numbers("rlnPixelSize") if "rlnPixelSize" in particles else None
    micrometres = particles.numbers("rlnDetectorPixelSize")
    with np.errstate(divide="ignore", invalid="ignore"):
        return micrometres * 1e4 / particles.numbers("rlnMagnification")


def _find_duplicates(found: Survey) -> None:
    """Warn of rows that name the same image."""
    if found.problems:
        return
    identity = np.stack([found.file_of, found.image_of], 1)
    order = np.lexsort(identity.T)  # stable: the first row of an image stays the first
    again = (identity[order][1:] == identity[order][:-1]).all(1)
    if not again.any():
        return
    first = int(order[1:][again].min())
    (same,) = np.nonzero((identity == identity[first]).all(1))
    others = int(again.sum()) - 1
    what = f"this row names the image of row {int(same[0]) + 1}"
    if others:
        what += f", and {others:,} more name an image that a row above them names"
    remedy = (
        "remove them: the same image in both half-sets makes resolutions look better than they are"
    )
    found.warnings.append(Problem(found.path, first + 1, what, remedy))


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


def _locate(found: Survey, names: pa.ChunkedArray, root: Path | None, allow_outside: bool) -> None:
    """Find the stack and the image of each row."""
    parts = pc.extract_regex(names, _IMAGE_NAME).combine_chunks()  # null without a match
    number, stack_name = parts.flatten()
    found.problems += row_problems(
        found.path,
        np.flatnonzero(stack_name.is_null()),
        lambda row: f"rlnImageName '{names[row].as_py()}' does not name an image of a stack",
        "write it as number@stack, e.g. 000001@particles.mrcs, numbers from 1",
    )
    numbers = number.fill_null("1").cast(pa.int64()).to_numpy()
    files: list[ImageFile] = []
    file_of = np.full(len(names), -1, np.int32)
    encoded = stack_name.dictionary_encode()
    stack_of = encoded.indices.fill_null(-1).to_numpy()
    order = np.argsort(stack_of, kind="stable")
    bounds = np.searchsorted(stack_of[order], np.arange(len(encoded.dictionary) + 1))
    for i, name in enumerate(encoded.dictionary.to_pylist()):
        rows = order[bounds[i] : bounds[i + 1]]
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
    optics, label = star.optics_table, "rlnOpticsGroup"
    if optics is None or not {label, "rlnImageSize"} <= set(optics.labels):
        return
    if label not in star.table:
        return
    sizes = optics.numbers("rlnImageSize")
    used = np.isin(optics.numbers(label), star.table.numbers(label))
    for row in np.flatnonzero(used & np.isfinite(sizes) & (sizes != width)):
        what = f"data_optics, row {row + 1}: images of {sizes[row]:g} pixels, where {has}"
        yield Problem(found.path, None, what, "correct rlnImageSize, or " + _SAME_SCALE)
