"""Recipes of an enemy: told in words, at a small price, and nothing but a user's mistake comes of any text."""

import string
from contextlib import suppress
from pathlib import Path

import pytest
from hostile import ALWAYS, refusal
from hypothesis import example, given
from hypothesis import strategies as st

from cuboid.parallel.errors import UserError
from cuboid.trainer.recipe_file import MAX_BYTES, RecipeFile, dump_recipe, load_recipe

QUICKSTART = (Path(__file__).parents[1] / "recipes" / "quickstart.yaml").read_text()
LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"


def filled(piece: str, *, begin: str = "", end: str = "") -> str:
    """As many pieces as a recipe may have bytes."""
    return begin + piece * ((MAX_BYTES - len(begin) - len(end)) // len(piece)) + end


COSTLY = {
    "a list": filled("0,", begin="a: [", end="]"),
    "a block": filled("- 0\n", begin="a:\n"),
    "mappings": filled("{},", begin="a: [", end="]"),
    "unknown keys": "".join(f"k{number}: 0\n" for number in range(2_400)),
    "keys without values": filled("a,", begin="{", end="}"),
    "the same key": "a: 1\n" * 2_400,
    "nested lists": filled("["),
    "nested mappings": filled("{a: "),
    "nested blocks": filled("- "),
    "nested keys": filled("? "),
    "a scalar": filled("x", begin="a: "),
    "escapes": filled("\\U0001F600", begin='a: "', end='"'),
    "lines of a scalar": filled("x\n ", begin="a: "),
    "a literal": filled(" x\n", begin="a: |\n"),
    "a number": filled("9", begin="seed: "),
    "a hexadecimal number": filled("f", begin="seed: 0x"),
    "a key": filled("a", begin="? ", end="\n: 1"),
    "a tag": filled("x", begin="a: !"),
    "an anchor": filled("x", begin="a: &"),
    "comments": filled("#\n"),
    "blanks": filled(" ", end="a: 1"),
    "documents": filled("---\n"),
    "laughs": LAUGHS * 1000,
    "a merge": "a: &a {b: 1}\nc: {<<: *a}\n",
    "one byte more": filled("#") + "##########",
}
OFTEN = ("a list", "unknown keys", "the same key", "lines of a scalar", "nested mappings", "laughs")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.full) for name in COSTLY]
)
def test_a_costly_recipe_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.yaml").write_text(COSTLY[case])
    assert "x.yaml" in refusal(load_recipe, tmp_path / "x.yaml")
    if len(COSTLY[case]) < 1 << 17:  # the system takes no longer argument
        assert "override" in refusal(load_recipe, "quickstart", [f"model.config={COSTLY[case]}"])


def check_text(text: str) -> None:
    with suppress(UserError):
        recipe = RecipeFile(text, "x.yaml").recipe()
        assert RecipeFile(dump_recipe(recipe), "x.yaml").recipe() == recipe


PIECES = [
    *"{}[],:&*!|>'\"%@`#-?\n\t ~",
    ": ",
    "- ",
    "!!python/name:os.system ",
    "<<: *a",
    "&a",
    "\0",
    "\x1b[2J",
    "\ud800",
    "1e999",
]
WORDS = st.lists(
    st.sampled_from([*PIECES, *["model", "data", "kind", "seed", "null", ".nan", "0x1F", "9999999999999999999"]]),
    max_size=40,
)


@ALWAYS
@given(st.text(max_size=60) | WORDS.map("".join))
@example("\ud800")
@example("a: \x85")
def test_any_text_is_a_recipe_or_a_mistake(text: str) -> None:
    check_text(text)
    check_text(f"{QUICKSTART}\n{text}")


@st.composite
def edited(draw: st.DrawFn) -> str:
    """The quickstart with a few places changed."""
    text = QUICKSTART
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.integers(0, 10))
        text = text[:start] + draw(st.sampled_from(PIECES) | st.text(max_size=5)) + text[stop:]
    return text


@ALWAYS
@given(edited())
def test_any_change_of_a_recipe_is_a_recipe_or_a_mistake(text: str) -> None:
    check_text(text)


@ALWAYS
@given(
    st.lists(
        st.text(max_size=30)
        | st.tuples(
            st.sampled_from(
                [
                    "name",
                    "seed",
                    "model",
                    "model.config",
                    "data.path",
                    "data.weights",
                    "lora.rank",
                    "train",
                    "launch",
                    "parallel.shard",
                ]
            )
            | st.text(string.ascii_lowercase + ".", max_size=12),
            WORDS.map("".join) | st.text(max_size=20) | st.floats().map(str) | st.integers().map(str),
        ).map("=".join),
        min_size=1,
        max_size=3,
    )
)
@example(["model.config={model_type: llama, x: 1}", "model.config.x.y=1"])
def test_any_override_is_taken_or_a_mistake(overrides: list[str]) -> None:
    with suppress(UserError):
        recipe = load_recipe("quickstart", overrides)
        assert RecipeFile(dump_recipe(recipe), "x.yaml").recipe() == recipe
