"""The particle's section and its lengths."""

import pytest

from cryoalign.particles.settings import Box, Images, Particle, in_pixels
from cryoalign.search.settings import SearchSettings

UNKNOWN = Box(64, None)


@pytest.mark.parametrize("pixel_size", [1.3, 2.6, 0.65])
def test_a_length_in_angstrom_is_the_same_length_in_pixels(pixel_size: float) -> None:
    box = Box(512, pixel_size)
    one = Particle(radius="130 A", max_shift="13 A")
    number = 130 / pixel_size
    other = Particle(radius=f"{number:g} px", max_shift=f"{number / 10:g} px")
    assert one.radius_in(box) == pytest.approx(number)
    assert one.radius_in(box) == pytest.approx(other.radius_in(box))
    assert one.max_shift_in(box) == pytest.approx(other.max_shift_in(box))
    assert one.radius_or_part(box) == pytest.approx(other.radius_or_part(box))
    assert SearchSettings().on(one, box) == SearchSettings().on(other, box)
    if pixel_size == 1.3:
        assert other == Particle(radius="100 px", max_shift="10 px")


def test_lengths_are_of_the_prepared_images() -> None:
    """Down-sampled to half the box, an ångström is half as many pixels; a pixel stays one."""
    particle = Particle(radius="130 A", max_shift="3 px")
    whole, half = (Images(box=box).box_of(256, 1.3) for box in (None, 128))
    assert particle.radius_in(whole) == pytest.approx(100)
    assert particle.radius_in(half) == pytest.approx(50)
    assert particle.max_shift_in(whole) == particle.max_shift_in(half) == 3


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("36 px", "36 px"),
        ("36px", "36 px"),
        ("  36   px ", "36 px"),
        ("130 A", "130 A"),
        ("130 Å", "130 A"),
        ("130Å", "130 A"),
        ("3.50 px", "3.5 px"),
        ("0.5 px", "0.5 px"),
        ("1e2 A", "100 A"),
        (".5 px", "0.5 px"),
    ],
)
def test_a_length_is_kept_as_it_is_meant(text: str, kept: str) -> None:
    assert Particle(max_shift=text).max_shift == kept
    assert Particle(radius=text).radius == kept


@pytest.mark.parametrize(
    "wrong",
    [36, 36.0, "36", "px", "36 nm", "-3 px", "3 px 4", "1.2.3 px", "", ".", "inf px", "nan A", True,
     [36], "36 PX", "36 a", ". px"],
)  # fmt: skip
def test_a_length_without_a_number_or_its_unit_is_refused(wrong: object) -> None:
    for name in ("radius", "max_shift"):
        with pytest.raises(ValueError, match='with its unit, like "36 px" or "130 A"'):
            Particle(**{name: wrong})


def test_angstrom_need_a_pixel_size() -> None:
    with pytest.raises(
        ValueError, match=r"particle\.radius is 130 A, but the pixel size of the input is not known"
    ):
        Particle(radius="130 A").radius_in(UNKNOWN)
    with pytest.raises(ValueError, match=r"give particle\.max_shift in pixels, for example 36 px"):
        Particle(max_shift="4 Å").max_shift_in(UNKNOWN)
    assert Particle(radius="36 px").radius_in(UNKNOWN) == 36
    assert in_pixels("4 A", Box(64, 2.0), "some") == 2


def test_no_radius_is_part_of_the_box_or_the_room_there_is() -> None:
    assert Particle().radius_in(UNKNOWN) is None
    assert Particle().radius_or_part(UNKNOWN) == pytest.approx(25.6)
    assert SearchSettings().on(Particle(max_shift="2 px"), UNKNOWN).rings(64).last_ring == 29


def test_a_search_is_of_the_particle() -> None:
    particle = Particle(radius="20.4 px", max_shift="2.5 px", mirror=False)
    how = SearchSettings(shift_step=0.5, first_ring=3, ring_step=2, refine=False, mode="exhaustive")
    search = how.on(particle, UNKNOWN)
    assert (search.last_ring, search.max_shift, search.mirror) == (20, 2.5, False)
    for name in ("shift_step", "first_ring", "ring_step", "refine", "mode"):
        assert getattr(search, name) == getattr(how, name)
    with pytest.raises(ValueError, match=r"particle\.radius\) of at most 28 px"):
        how.on(Particle(radius="29 px"), UNKNOWN)


def test_other_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="diameter"):
        Particle(diameter="200 A")  # type: ignore[call-arg]
