"""Names are found by reading the sources: before torch is imported, from one file each, and never
twice.
"""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pydantic
import pytest

from pipeline.config import registry

ROOT = Path(registry.__file__).parents[2]
DECLARED = [(kind, name) for kind in registry.FOLDERS for name in registry.names(kind)]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty house with the folder of every kind; ``house(technique=text)`` writes a file in the
    folder of a kind.
    """
    for place in registry.FOLDERS.values():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch() if place.endswith(".py") else (tmp_path / place).mkdir()
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    registry.forget()

    def write(file: str = "made.py", **texts: str) -> Path:
        for kind, text in texts.items():
            path = tmp_path / registry.FOLDERS[kind] / file
            path.write_text(textwrap.dedent(text))
        registry.forget()
        return path

    yield write
    registry.forget()


def test_something_of_every_kind_is_declared():
    assert {kind for kind, _ in DECLARED} == set(registry.FOLDERS)


def test_names_and_options_are_known_without_importing_torch():
    program = textwrap.dedent("""
        import sys
        from pipeline.config import registry
        for kind in registry.FOLDERS:
            for name in registry.names(kind):
                print(kind, name, sorted(registry.entry(kind, name).options().model_dump()))
        for name in registry.names("model"):
            print(len(registry.architectures(name)) > 0)
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "timm", "transformers", "tokenizers", "numpy", "pyarrow"}))
        print(sorted(name for name in sys.modules if name.startswith("pipeline")))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *lines, heavy, ours = done.stdout.splitlines()
    assert [tuple(line.split()[:2]) for line in lines if line != "True"] == DECLARED
    assert lines.count("True") == len(registry.names("model"))
    assert heavy == "[]"
    modules = ("familiar_names", "plugins", "registry")
    config = ["pipeline.config", *(f"pipeline.config.{name}" for name in modules)]
    assert ours == str(["pipeline", *config, "pipeline.io", "pipeline.io.json_values"])


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_the_options_read_are_the_options_imported(kind, name):
    thing, entry = registry.get(kind, name), registry.entry(kind, name)
    assert thing.registered_name == name
    module = importlib.import_module(entry.module)
    assert vars(module)[entry.attribute] is thing, "the name is declared where it is defined"
    assert entry.options.model_json_schema() == thing.options_class.model_json_schema()
    assert entry.options().model_dump() == thing.options_class().model_dump(), (
        "every option has a default"
    )
    for field, info in thing.options_class.model_fields.items():
        assert info.description, f"{kind} {name}: option {field} has no description"


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_options_are_frozen_and_refuse_what_is_not_declared(kind, name):
    options = registry.entry(kind, name).options
    with pytest.raises(pydantic.ValidationError, match="extra_forbidden"):
        options.model_validate({"not_an_option": 1})
    for field in options.model_fields:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(options(), field, None)


@pytest.mark.parametrize(
    ("kind", "name"), [pair for pair in DECLARED if pair[0] in ("modality", "objective")]
)
def test_the_roles_read_are_the_roles_imported(kind, name):
    thing = registry.get(kind, name)
    assert registry.roles(kind, name) == (thing.roles, getattr(thing, "optional_roles", ()))


def test_an_unknown_name_or_kind_is_refused():
    with pytest.raises(ValueError, match=r"unknown technique 'lpft'; did you mean lp_ft"):
        registry.get("technique", "lpft")
    with pytest.raises(ValueError, match=r"unknown objective 'xyz'; valid names: .*classification"):
        registry.entry("objective", "xyz")
    with pytest.raises(ValueError, match="unknown kind 'tecnique'"):
        registry.register("tecnique", "x")(object)


# ---------------------------------------------------------------- a house of its own


def test_a_new_file_is_found_without_another_edit(house):
    house(
        technique="""
        from __future__ import annotations
        import a_package_that_is_not_installed
        from typing import Literal
        from pydantic import Field
        from pipeline.config.registry import Options, register

        class Base(Options):
            rank: int = Field(4, ge=1, description="width")

        class LoraOptions(Base):
            where: Literal["attention", "all"] = Field("attention", description="which layers")
            names: list[str] | None = Field(None, description="by name")

        @register("technique", "lora", options=LoraOptions)
        class Lora:
            pass

        @register("technique", "plain")
        def plain():
            pass
    """
    )
    assert registry.names("technique") == ["lora", "plain"]
    entry = registry.entry("technique", "lora")
    assert (entry.kind, entry.name, entry.module) == (
        "technique",
        "lora",
        "pipeline.techniques.made",
    )
    assert entry.options().model_dump() == {"rank": 4, "where": "attention", "names": None}
    with pytest.raises(pydantic.ValidationError):
        entry.options(where="nowhere")
    with pytest.raises(pydantic.ValidationError):
        entry.options(rank=0)
    assert registry.entry("technique", "plain").options is registry.Options


def test_a_doubled_name_is_refused_with_both_places(house):
    text = '@register("objective", "twice")\nclass A:\n    pass\n'
    house("a.py", objective=text)
    second = house("b.py", objective="\n\n" + text)
    with pytest.raises(ValueError) as caught:
        registry.names("objective")
    assert f"{second}:3" in str(caught.value)
    assert "'twice' is already declared in pipeline.objectives.a" in str(caught.value)


def test_a_name_in_the_folder_of_another_kind_is_refused(house):
    path = house(model='@register("technique", "lost")\nclass A:\n    pass\n')
    with pytest.raises(
        ValueError, match="a technique is registered in the folder of models"
    ) as caught:
        registry.names("model")
    assert f"{path}:1" in str(caught.value)


def test_options_that_stand_elsewhere_are_refused(house):
    path = house(
        technique='from x import Elsewhere\n@register("technique", "a", options=Elsewhere)\nclass '
        "A:\n    pass\n"
    )
    with pytest.raises(
        ValueError, match="options class Elsewhere must stand in the same file"
    ) as caught:
        registry.names("technique")
    assert str(path) in str(caught.value)


def test_roles_are_the_classs_own_or_those_of_a_base_in_the_same_file(house):
    house(
        objective="""
        import a_package_that_is_not_installed

        class Base(Elsewhere):
            roles: ClassVar[tuple[str, ...]] = ("label", "weight")

        @register("objective", "own")
        class Own(Base):
            roles = ("box",)
            optional_roles: ClassVar[tuple[str, ...]] = ("area",)

        @register("objective", "taken")
        class Taken(a_package_that_is_not_installed.Thing, Own):
            optional_roles = ()

        @register("objective", "inherited")
        class Inherited(Base):
            roles: ClassVar[tuple[str, ...]]

        @register("objective", "bare")
        def bare():
            roles = ("no",)
    """
    )
    assert registry.roles("objective", "own") == (("box",), ("area",))
    assert registry.roles("objective", "taken") == (("box",), ())
    assert registry.roles("objective", "inherited") == (("label", "weight"), ())
    assert registry.roles("objective", "bare") == ((), ())


@pytest.mark.parametrize(
    "written", ["LABEL", "(LABEL,)", "'label'", "['label']", "(1,)", "('a',) + ('b',)"]
)
def test_roles_that_are_not_written_out_are_refused(house, written):
    path = house(
        objective=f'LABEL = "label"\n@register("objective", "a")\nclass A:\n    roles = {written}\n'
    )
    with pytest.raises(ValueError, match="roles must be a tuple of texts written out") as caught:
        registry.names("objective")
    assert f"{path}:4" in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_true_is_no_number_of_an_option(kind, name):
    options = registry.entry(kind, name).options
    for field, info in options.model_fields.items():
        if info.annotation in (int, float):
            with pytest.raises(pydantic.ValidationError, match="true and false are no value here"):
                options.model_validate({field: True})
        if info.annotation is bool:
            try:
                options.model_validate({field: True})
            except (
                pydantic.ValidationError
            ) as error:  # stoch_norm has no use for one of its options
                assert "true and false are no value here" not in str(error)


def test_architectures_are_a_list_or_what_a_package_says(house):
    house(
        "own.py",
        model='ARCHITECTURES = ["one", "two"]\n@register("model", "own")\nclass A:\n    pass\n',
    )
    house(
        "found.py",
        model='ARCHITECTURES = ("json", "*.py", r"^def (load\\w*)")\n@register("model", '
        '"found")\nclass A:\n    pass\n',
    )
    house(
        "gone.py",
        model='ARCHITECTURES = ("no_such_package_here", "*.py", "x")\n@register("model", '
        '"gone")\nclass A:\n    pass\n',
    )
    house("none.py", model='@register("model", "none")\nclass A:\n    pass\n')
    assert registry.architectures("own") == {"one", "two"}
    assert registry.architectures("found") == {"load", "loads"}
    with pytest.raises(ValueError, match="package no_such_package_here is not installed"):
        registry.architectures("gone")
    with pytest.raises(ValueError, match="declares no ARCHITECTURES"):
        registry.architectures("none")
    with pytest.raises(ValueError, match="unknown model 'owm'; did you mean own"):
        registry.architectures("owm")


def test_a_library_says_where_the_tags_of_its_weights_are_and_what_it_reads(house):
    house(
        "own.py",
        model='TAGS = ("json", "*.py", r"^def ({model}\\w*)")\nMODALITY = {"one": "audio"}\n'
        '@register("model", "own")\nclass A:\n    pass\n',
    )
    house("plain.py", model='MODALITY = "image"\n@register("model", "plain")\nclass A:\n    pass\n')
    assert registry.split_tag("own/one.big") == ("own/one", "big")
    for name in ("own/one", "own/one.", "plain/one.big", "hf:a/b.c"):
        assert registry.split_tag(name) == (name, "")
    assert registry.tags("own/load") == {"load", "loads"} and registry.tags("own/dum") == {
        "dump",
        "dumps",
    }
    named = ("own/one", "own/two", "plain/any", "gone/one")
    assert [registry.modality_of(name) for name in named] == ["audio", None, "image", None]


# ---------------------------------------------------------------- timm's names


def test_names_read_from_timm_are_those_that_timm_has():
    timm = pytest.importorskip("timm")
    assert registry.architectures("timm") == set(timm.list_models(module="", include_tags=False))


# ---------------------------------------------------------------- nearest


@pytest.mark.parametrize(
    ("value", "valid", "said"),
    [
        ("lp_fft", ["lp_ft", "full", "scratch"], "did you mean lp_ft?"),
        ("resnet", ["resnet18", "resnet34"], "did you mean resnet34 or resnet18?"),
        (
            "vit",
            ["a_long_name_with_vit_in_it", "other"],
            "did you mean a_long_name_with_vit_in_it?",
        ),
        (
            "VIT",
            ["a_long_name_with_vit_in_it", "other"],
            "did you mean a_long_name_with_vit_in_it?",
        ),
        ("x", ["fixmatch", "full"], "valid names: fixmatch, full"),
        ("zzz", ["b", "a"], "valid names: a, b"),
        ("zzz", [], "valid names: "),
    ],
)
def test_nearest(value, valid, said):
    assert registry.nearest(value, valid) == said


def test_nearest_is_short():
    many = [f"name{i:04d}" for i in range(1000)]
    assert registry.nearest("zzz", many).endswith("name0019, ... (1000 in all)")
    assert registry.nearest("name0005", many[:5] + many[6:]).count(" or ") <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "@register('technique', 'odd')\nclass Odd(:\n    pass\n",
            r"made\.py:2: cannot be read as",
        ),
        (
            "@register('technique', 'odd', options=OddOptions)\nclass Odd:\n    pass\n"
            "class OddOptions(Options):\n    b: int = 1 // 0\n",
            r"made\.py: options class OddOptions: ZeroDivisionError",
        ),
    ],
)
def test_a_faulty_file_is_named_in_one_line(house, text, message):
    house(technique=text)
    with pytest.raises(ValueError, match=message):
        registry.entries("technique")
