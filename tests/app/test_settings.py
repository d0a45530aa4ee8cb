"""Settings: what is shipped loads, what is wrong is refused in the user's own words."""

import re
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path

import pytest
import yaml

from cryoalign.app.schema import describe, known_keys, settings_from_words
from cryoalign.app.settings import (
    RunConfig,
    SimulateConfig,
    flat,
    load_config,
    save_config,
    used_mapping,
)
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.isac.isac import classify_stable
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.rfa import align_reference_free
from cryoalign.particles.settings import Box
from cryoalign.particles.simulate import simulate
from cryoalign.search.settings import Schedule

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SECTIONS = {key.partition(".")[0] for key, _ in known_keys(RunConfig) if "." in key}
GIVEN = ("particles=stack.mrcs", "n_classes=3", "method=mra")


def load_text(tmp_path, text, *overrides):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    config = load_config(path, ["particles=other.star"])
    assert config.particles == Path("other.star")


def test_the_configs_show_every_key_with_its_default():
    shown = set()
    for name in ("mra.yaml", "rfa.yaml", "classify.yaml", "isac.yaml"):
        path = next(path for path in CONFIGS if path.name == name)
        written = yaml.safe_load(path.read_text())
        shown |= {
            f"{name}.{leaf}" if leaf else name
            for name, value in written.items()
            for leaf in (value if isinstance(value, dict) else [""])
        }
        given = [*(GIVEN[:1] if path.stem == "isac" else GIVEN), f"method={path.stem}"]
        if path.stem == "rfa":
            given.append("n_classes=1")
        assert load_config(path, given) == load_config(None, given)
    assert shown == set(dict(known_keys(RunConfig)))


def test_keys_are_the_arguments_of_the_functions_behind_them():
    by_name = {field.name for field in fields(RunConfig)}
    passed = {"particles", "resume", "on_step", "progress", "optics"}
    defaults = load_config(None, GIVEN)
    for function in (align_multi_reference, align_reference_free, classify, classify_stable):
        arguments = signature(function).parameters
        assert set(arguments) - passed <= by_name
        for name in set(arguments) - passed - SECTIONS - {"n_classes", "references"}:
            assert getattr(defaults, name) == arguments[name].default, name
    simulation = signature(simulate).parameters
    assert [field.name for field in fields(SimulateConfig)] == list(simulation)
    for name in set(simulation) - {"n", "n_classes"}:
        assert getattr(SimulateConfig(), name) == simulation[name].default, name


def test_overrides_go_before_the_file_and_later_ones_before_earlier(tmp_path):
    text = "particles: a.star\nmethod: mra\nn_classes: 4\nsearch:\n  first_ring: 2\n"
    config = load_text(tmp_path, text, "search.first_ring=5", "search.first_ring=4", "settle=1e-3")
    assert (config.search.first_ring, config.settle, config.n_classes) == (4, 1e-3, 4)
    assert config.search.shift_step == 1.0  # the rest of a section stays
    assert load_text(tmp_path, text, "search={ring_step: 2}").search.first_ring == 2


def test_texts_on_the_command_line_are_taken_as_written():
    config = load_config(None, ["particles=a: b #1.star", "n_classes=2", "output=2024"])
    assert (config.particles, config.output) == (Path("a: b #1.star"), Path("2024"))


def test_yaml_means_what_it_shows(tmp_path):
    """YAML 1.1's surprises: 1e-3 is a text there, 010 is 8, and `no` is false."""
    config = load_text(
        tmp_path, "particles: no\nn_classes: 010\nsettle: 1e-3\nmethod: mra\nsearch:\n"
    )
    assert (config.particles, config.n_classes, config.settle) == (Path("no"), 10, 1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("search.firstring=30", "unknown key search.firstring; did you mean search.first_ring?"),
        ("search.last_ring=30", "unknown key search.last_ring; it is now called particle.radius"),
        ("search.max_shift=4", "unknown key search.max_shift; it is now called particle.max_shift"),
        ("isac.mirror=false", "unknown key isac.mirror; it is now called particle.mirror"),
        ("likelihood.ctf=false", "unknown key likelihood.ctf; it is now called particle.ctf"),
        (
            "averaging.mask_radius=9",
            "unknown key averaging.mask_radius; it is now called particle.radius",
        ),
        ("particle.radius=36", 'particle.radius: should be a length with its unit, like "36 px"'),
        ("particle.max_shift=3cm", 'like "36 px" or "130 A", got the text \'3cm\''),
        ("particle.max_shift=-3px", 'like "36 px" or "130 A", got the text \'-3px\''),
        (
            "max_shift=3",
            "unknown key max_shift; did you mean particle.max_shift or schedule.max_shift?",
        ),
        ("nclasses=3", "unknown key nclasses; did you mean n_classes?"),
        ("qqq=1", "unknown key qqq; `cryoalign run --help` lists the keys"),
        ("search=3", "search: should be a section, got 3"),
        ("n_classes=ten", "n_classes: should be a whole number, got the text 'ten'"),
        ("n_classes='10'", "n_classes: should be a whole number, got the text '10'"),
        ("n_classes=2.5", "n_classes: should be a whole number, got 2.5"),
        ("n_classes=true", "n_classes: should be a whole number, got true"),
        ("n_classes=0", "n_classes: should be greater than or equal to 1, got 0"),
        ("particle.mirror=yes", "particle.mirror: should be true or false, got the text 'yes'"),
        ("particle.mirror=1", "particle.mirror: should be true or false, got 1"),
        ("search.shift_step=.inf", "search.shift_step: should be a finite number, got inf"),
        ("search.shift_step=.nan", "search.shift_step: should be a finite number, got nan"),
        ("search.shift_step=[1]", "search.shift_step: should be a number, got a list"),
        ("settle=null", "settle is missing"),
        ("device=gpu", "device: should be 'auto', 'cpu' or 'cuda', got the text 'gpu'"),
        ("search.shift_step=100 images.box=64", "no shift would be tried"),
        ("method=classify references=views.mrcs", "references: leave it out, or use method=mra"),
        ("method=classify averaging.centre=none", "use averaging.centre: leave it out, or use"),
        ("method=classify iterations=9", "this method has likelihood.cycles instead"),
        ("method=rfa particle.max_shift=2px", "this method has schedule.max_shift instead"),
        ("method=isac search.ring_step=2", "method=isac does not use search.ring_step"),
        ("particle.ctf=false", "should be auto (which was true), flip, model or none (which was"),
        ("particle.ctf=model", "method=mra has no CTF in a model: leave out particle.ctf=model"),
        ("method=isac particle.ctf=model", "method=isac has no CTF in a model"),
        ("likelihood.starts=2", "starts: leave it out, or use method=classify"),
        ("assign.strategy=soft iterations=8", "soft anneals for 8 iterations, but there are 8"),
        ("assign.start_classes=1 iterations=8", "1 classes become 3 after 2 times 4 iterations"),
        ("schedule.kicks=1", "schedule.kicks"),
        ("method=rfa n_classes=1 schedule.kick_angle=0.5", "schedule.kick_angle: should be"),
        (
            "method=rfa n_classes=1 schedule.max_shift=2 schedule.shift_step=1 schedule.kicks=1",
            "schedule.kicks has no effect in a schedule of one step",
        ),
        ("assign.slack=0.3", "assign.slack has an effect only with assign.strategy=equal"),
        (
            "assign.strategy=equal assign.anneal=2",
            "assign.anneal has an effect only with",
        ),
        (
            "assign.similarity=correntropy",
            "assign.similarity has an effect only with",
        ),
        (
            "assign.level_iterations=2",
            "assign.level_iterations has an effect only with",
        ),
        ("method=rfa images.box=32", "makes one average: leave n_classes out"),
        ("schedule.max_shift=[4,2]", "schedule.max_shift has 2 steps, schedule.shift_step 4"),
        ("schedule.max_shift=[4,x]", "schedule.max_shift: should be a number"),
        ("schedule.max_shift=4,two", 'should be numbers, like [4, 2, 1] or "4 2 1", got the text'),
        ("schedule.shift_step=[8,1,1,1]", "schedule.shift_step 8 px is larger"),
        ("method=classify assign.strategy=equal", "method=classify does not use assign.strategy"),
        ("references=v.mrcs n_classes=null assign.start_classes=2", "start_classes needs n_class"),
        ("method=isac", "n_classes: leave it out; this method has isac.images_per_group instead"),
        ("isac.images_per_group=50 isac.min_group_size=80", "min_group_size 80 is above"),
        ("averaging.filter=gauss", "should be 'wiener' or 'none'"),
        ("settle=[1", "settle: '[1' is not a YAML value"),
        ("settle", "'settle' should be key=value"),
        ("=3", "'=3' should be key=value"),
        ("particles=", "particles is missing; add particles=..."),
        ("n_classes=null", "n_classes is missing: method=mra needs it"),
        (
            "images.box=20 particle.radius=4px search.first_ring=6",
            "last_ring 4 px lies inside first",
        ),
        ("images.box=20 particle.radius=9px", "of at most 6 px"),
        ("overwrite=true resume=true output=x", "exclude each other"),
        ("resume=true", "resume needs output"),
    ],
)
def test_wrong_settings_are_refused_in_words(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [*GIVEN, *wrong.split()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_classes: 3\nn_classes: 4\n", "the key n_classes occurs twice"),
        ("search: {ring_step: 3, ring_step: 4}\n", "the key ring_step occurs twice"),
        ("- n_classes\n", "should have lines like `key: value`, not a list"),
        ("n_classes: [\n", "cannot be read as YAML"),
        ("n_classes: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("n_classes: !!int x\n", "a value cannot be read"),
        ("? [1, 2]\n: 3\n", "cannot be read as YAML"),
        ("1: 2\n", "unknown key 1"),
        ("search:\n  1: 2\n", "unknown key search.1"),
        ("seed: 2024-01-01\n", "seed: should be a whole number, got the text '2024-01-01'"),
        ("particles: 10\n", "particles: should be text (quote it), got 10"),
    ],
)
def test_wrong_files_are_refused_in_words(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_text(tmp_path, text, *(() if "particles" in text else GIVEN[:1]))
    assert "some.yaml" in str(error.value)


def test_search_is_not_in_the_way_of_methods_without_it():
    """A disc of 9 px and shifts of 4 px leave a box of 24 px, but classify needs no such room."""
    words = ["images.box=24", "particle.radius=9px", "particle.max_shift=4px", "n_classes=3"]
    load_config(None, [*GIVEN[:1], *words, "method=classify"])
    with pytest.raises(ValueError, match=r"images\.box"):
        load_config(None, [*GIVEN[:1], *words, "method=mra"])


def test_the_method_follows_from_the_references():
    """Without references the classes are found by likelihood."""
    assert load_config(None, GIVEN[:2]).method == "classify"
    assert load_config(None, [*GIVEN[:2], "references=random"]).method == "classify"
    assert load_config(None, [*GIVEN[:2], "references=views.mrcs"]).method == "mra"
    assert load_config(None, [*GIVEN[:2], "method=null"]).method == "classify"


@pytest.mark.parametrize("method", ["mra", "rfa", "classify", "isac"])
def test_a_resolved_file_of_defaults_loads_for_every_method(tmp_path, method):
    given = GIVEN if method in ("mra", "classify") else GIVEN[:1]
    config = load_config(None, [*given, f"method={method}"])
    save_config(tmp_path / "config.yaml", config)
    assert load_config(tmp_path / "config.yaml") == config
    used = used_mapping(config)
    assert ("likelihood" in used, "isac" in used) == (method == "classify", method == "isac")
    assert ("search" in used) == (method in ("mra", "rfa"))
    assert "particle" in used


def test_all_problems_are_told_at_once_with_their_places(tmp_path):
    text = "search:\n  shift_step: wide\n  firstring: 4\nn_classes: 0\n"
    with pytest.raises(ValueError, match=r"^6 problems in the settings:") as error:
        load_text(tmp_path, text, "device=gpu", "settle=2")
    told = str(error.value)
    assert "particles is missing" in told
    assert told.count("some.yaml: ") == 3
    assert told.count("command line: ") == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_saved_settings_load_as_the_same(tmp_path):
    """Texts that look like numbers or words of YAML must come back as texts."""
    for name in ("1e3", "yes", "null", "010", "a: b", "ü #1", "~", "2024-01-01"):
        config = load_config(None, [*GIVEN, "particle.max_shift=1e-7 px", "search.shift_step=1e-7"])
        config = replace(config, output=Path(name), particles=Path("x", name))
        save_config(tmp_path / "config.yaml", config)
        assert load_config(tmp_path / "config.yaml") == config, name


def test_flat_has_the_value_of_every_key():
    values = flat(load_config(None, [*GIVEN, "particle.max_shift=4 A"]))
    assert list(values) == list(dict(known_keys(RunConfig)))
    assert (values["particle.max_shift"], values["n_classes"]) == ("4 A", 3)


def test_description_has_a_line_for_every_key():
    lines = describe(RunConfig).splitlines()
    assert [line.split()[0] for line in lines] == list(dict(known_keys(RunConfig)))
    shift = next(line for line in lines if "search.shift_step" in line)
    assert "1.0" in shift
    assert "> 0" in shift
    assert "px" in shift
    assert "Annotated" not in describe(RunConfig)
    assert all(field.description for _, field in known_keys(RunConfig))


def test_a_schedule_is_read_from_lists_and_from_words_of_sparx():
    words = [*GIVEN[:1], "method=rfa"]
    listed = load_config(None, [*words, "schedule.max_shift=[3, 1]", "schedule.shift_step=[1, 1]"])
    told = load_config(None, [*words, "schedule.max_shift=3 1", "schedule.shift_step=1 1"])
    assert listed == told
    assert told.schedule == Schedule(max_shift=(3.0, 1.0), shift_step=(1.0, 1.0))
    one = load_config(None, [*words, "schedule.max_shift=2", "schedule.shift_step=1"])
    assert one.schedule.max_shift == (2.0,)
    assert told.made().max_shift(Box(64, None)) == 3


def test_a_script_tells_its_keys_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("n: 7\n")
    other.write_text("n: 8\n")

    def read(*words: str) -> SimulateConfig:
        return settings_from_words(SimulateConfig, default, words, "What it does.")

    assert read().n == 7
    assert read(str(other)).n == 8
    assert read(str(other), "n=9").n == 9
    for words, code, told in (
        (["--help"], 0, "What it does."),
        (["n=5", "-h"], 0, "views of the phantom"),
        (["qqq=1"], 2, "unknown key qqq; --help lists the keys"),
        (["n=5", str(other)], 2, "should be key=value"),
        (["missing.yaml"], 2, "no such configuration file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            read(*words)
        assert stopped.value.code == code
        printed = capsys.readouterr()
        assert told in (printed.err if code else printed.out)


def test_a_length_in_angstrom_goes_with_a_smaller_box() -> None:
    """The pixel size is in the input, which the settings alone do not know."""
    words = ["images.box=24", "particle.radius=25 A", "particle.max_shift=9 A"]
    config = load_config(None, [*GIVEN, *words])
    assert config.made().radius(config.images.box_of(48, 3.0)) == round(25 / 6)
