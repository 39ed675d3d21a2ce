"""The documents: tables that are made from the code, links that lead somewhere, a front page that stays one."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "docs/decisions").glob("*.md"))


def test_the_field_table_is_that_of_the_docstrings() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    made = runpy.run_path(str(ROOT / "docs/configuration.py"))["page"]()
    assert page == made, "run `python docs/configuration.py`"
    assert (
        "| `data.streams` | integer above 0 | `32` |" in page and "| `guidance.N.scale` | number | required |" in page
    )
    assert "|  |" not in page, "a field without a docstring"


@pytest.mark.parametrize("page", [*PAGES, *RECORDS], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text())
    for link in (a or b for a, b in links):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        file = page.parent / place if place else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_is_short_and_every_page_is_in_the_index() -> None:
    front = (ROOT / "README.md").read_text()
    assert len(front.splitlines()) <= 130
    assert "python launchers/slurm.py --nodes 8" in front and "python data_prep/encode_latents.py" in front
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES[2:]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_every_package_and_root_module_is_in_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    parts = [
        part.name for part in (ROOT / "ig_dist").iterdir() if part.suffix in ("", ".py") and part.name[0] not in "_."
    ]
    assert len(parts) > 20 and not [part for part in parts if not re.search(rf"`{part}[`/]", text)]


def test_the_picture_of_the_parts_is_that_of_the_imports() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/architecture_map.py"))
    assert drawn["PICTURE"].read_text() == drawn["picture"](), "run `python docs/architecture_map.py`"
    assert drawn["picture"]().count("<path") > 20


def test_every_decision_has_its_four_parts_and_is_in_the_map() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for record in RECORDS:
        parts = re.findall(r"^\*\*([\w ]+)[.?]\*\*", record.read_text(), re.MULTILINE)
        assert parts == ["Question", "Choice", "Measured", "What would change our mind"], record.name
        assert f"(decisions/{record.name})" in text, record.name
    assert len(RECORDS) >= 20


@pytest.mark.parametrize(("page", "rows"), [("architecture.md", 8), ("security.md", 20)])
def test_every_promise_names_tests_that_are_there(page: str, rows: int) -> None:
    _, *tables = re.split(r"^\|.*\| tests?[^|]*\|\n.*\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    promises = [line for table in tables for line in table.partition("\n\n")[0].splitlines()]
    assert len(promises) >= rows
    for promise in promises:
        for test in promise.split("|")[-2].split(","):
            file, name = test.strip(" `").split("::")
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
