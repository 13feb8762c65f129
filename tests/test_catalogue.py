"""The page of all methods says what their files say, and its example does what it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from harness import catalogue, registry
from harness.axes import load_sweep
from harness.check import check
from harness.protocol import Batch

HOW_TO = catalogue.page().split("## Add a method", 1)[1]


def test_the_page_is_up_to_date() -> None:
    assert catalogue.path().read_text(encoding="utf-8") == catalogue.page(), "run: python -m harness.catalogue"


def test_every_method_has_one_whole_row() -> None:
    rows = re.findall(r"^\| (?!method|-)(.+) \|$", catalogue.page(), re.MULTILINE)
    cells = {row.split(" | ")[0]: row.split(" | ") for row in rows}
    assert list(cells) == registry.names()
    for name, (_, paper, year, travels, needs, file) in cells.items():
        assert len(paper) > 10 or paper == year == "-", name
        assert year == "-" or year in paper
        assert re.fullmatch(r"\S.* / \S.*", travels), name
        assert needs == ", ".join(sorted(registry.make(name, {}).needs)) or needs == "-"
        assert (catalogue.path().parent / file.split("](")[1].rstrip(")")).is_file()


def test_sections_of_a_head() -> None:
    """Labels may stand anywhere in a line; text may wrap; the last label goes on to its colon."""
    text = """One sentence.

    Paper: A and B, A title: with a colon, NeurIPS
    2021. Travels down: the model. Travels up: the model and
    logits. Remembered by the client: nothing.
    Differences from the paper and its code: none; see there.
    """
    assert catalogue.sections(text) == {
        "": "One sentence.",
        "Paper": "A and B, A title: with a colon, NeurIPS 2021",
        "Travels down": "the model",
        "Travels up": "the model and logits",
        "Remembered by the client": "nothing",
        "Differences from": "none; see there",
    }


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        ("none; a control", ("-", "-")),
        ("A et al., arXiv 2006.16765, 2020. Its code differs, 2022", ("A et al., arXiv 2006.16765, 2020", "2020")),
        ("B, Title, Journal 2024 (arXiv 2107.00051); more", ("B, Title, Journal 2024 (arXiv 2107.00051)", "2024")),
        ("C, an unpublished text. It says little", ("C, an unpublished text", "-")),
    ],
)
def test_citations(paper: str, expected: tuple[str, str]) -> None:
    assert catalogue.citation(paper) == expected


def test_the_how_to_has_six_steps_and_its_example_conforms(tmp_path: Path) -> None:
    assert re.findall(r"^(\d)\. ", HOW_TO, re.MULTILINE) == list("123456")
    (example,) = re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL)
    method = tmp_path / "unsure.py"
    method.write_text(example, encoding="utf-8")
    findings = check(str(method))
    assert [f"{f.check}: {f.why}" for f in findings if not f.passed] == []
    assert "FedAvg's bits with weight=0.0" in [f.why for f in findings]
    torch.set_flush_denormal(False)


def test_the_example_computes_what_it_says(tmp_path: Path) -> None:
    """Logits (0, 0) and (ln 3, 0): CE of labels 0, 0 is (ln 2 + ln 4/3) / 2 = .490415; entropies are ln 2 = .693147
    and ln 4 - 3/4 ln 3 = .562335, mean .627741. With weight .5: .490415 - .313871 = .176544.
    """
    path = tmp_path / "unsure_numbers.py"
    path.write_text(catalogue.EXAMPLE, encoding="utf-8")
    method = registry.make(str(path), {"weight": 0.5})
    batch = Batch(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0]))
    value, _ = method.loss(lambda p, x: x, {}, batch, {}, {})  # type: ignore[arg-type]
    assert float(value) == pytest.approx(0.176544, abs=1e-6)


def test_the_sweep_of_all_methods_has_them_all() -> None:
    """Three seeds of each, in one world: partitions and cohorts do not depend on the method."""
    sweep = load_sweep("all-methods")
    assert sorted({cell.method for cell in sweep.cells}) == registry.names(), "add the method to all-methods.toml"
    assert len(sweep.cells) == 3 * len(registry.names())
    assert {cell.seed for cell in sweep.cells} == {0, 1, 2}
    for part in ("partition", "proxy", "holdout", "fleet", "clients", "cohort", "rounds", "local"):
        assert len({repr(getattr(cell, part)) for cell in sweep.cells}) == 1, part
    assert sweep.cells[0].partition.alpha == 0.1
