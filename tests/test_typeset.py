"""LaTeX: what is written compiles, and shows names as they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import published
from harness.statistics import Summary, summarise
from harness.typeset import escaped, latex
from harness.verdicts import Verdict

ODD = r"a&b_100%#{}~^\$<x>|\input{/etc/passwd} é"
ENGINES = [name for name in ("tectonic", "pdflatex") if shutil.which(name)]


def board(*methods: str, settings: int = 6) -> Summary:
    rows: list[dict[str, Any]] = []
    for at, method in enumerate(methods):
        for seed in range(3):
            for alpha in range(1, settings + 1):
                config = {"method": method, "seed": seed, "partition": {"alpha": alpha}}
                value = 0.5 + at / 20 + seed / 100 + at * seed / 1000 + alpha / 100
                row = {"trial_id": f"{at}-{seed}-{alpha}", "method": method, "dataset": "d", "seed": seed}
                row |= {"status": "done", "config": json.dumps(config)}
                rows.append(row | {f"global_accuracy_{name}": value for name in ("last10", "auc")})
    rows.append({**rows[0], "trial_id": "x", "seed": 9, "status": "failed", "reason": f"100 % of {ODD}"})
    return summarise(rows, baseline=methods[0])


def tables_of(text: str) -> list[list[list[str]]]:
    """The cells of every tabular, checked on the way: environments nest, every row has as many cells as columns."""
    open_ones: list[str] = []
    found: list[list[list[str]]] = []
    columns = 0
    for line in (line.strip() for line in text.splitlines() if not line.startswith("%")):
        if begun := re.match(r"\\begin\{(\w+)\}(?:\{(\w+)\})?", line):
            open_ones.append(begun[1])
            if begun[1] == "tabular":
                columns = len(begun[2])
                found.append([])
        elif ended := re.match(r"\\end\{(\w+)\}", line):
            assert open_ones.pop() == ended[1]
        elif open_ones and open_ones[-1] == "tabular" and line.endswith(r"\\"):
            cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
            assert len(cells) == columns
            found[-1].append([cell.strip() for cell in cells])
    assert not open_ones
    return found


def test_tables_are_well_formed() -> None:
    """Six settings: cells of three of them, beside which counts fit; differences of two; one table over all."""
    text = latex("sweep", board("fedavg", "kdia", ODD))
    found = tables_of(text)
    assert [len(table[0]) for table in found] == [4, 4, 3, 3, 3, 5]
    assert [len(table) for table in found] == [4, 4, 3, 3, 3, 4]
    assert len(re.findall(r"\\(?:top|mid|bottom)rule\n", text)) == 18
    bare = re.sub(r"\\[&%$#_{}\\]", "", re.sub(r"^%.*$", "", text, flags=re.M))
    assert bare.count("{") == bare.count("}")
    assert "%" not in bare
    assert "#" not in bare


def test_the_best_of_a_column_is_bold_and_letters_are_raised() -> None:
    first = tables_of(latex("sweep", board("fedavg", "kdia", settings=1)))[0]
    assert first[1][:2] == ["kdia", r"\textbf{57.10} $\pm$ 1.10\textsuperscript{a}"]
    assert first[2][0] == "fedavg"
    assert first[2][1].startswith(r"52.00 $\pm$ 1.00\textsuperscript{b}")


def test_a_cell_says_what_it_has_lost() -> None:
    assert tables_of(latex("sweep", board("fedavg", settings=1)))[0][1][1].endswith("(3 of 4)")


@pytest.mark.parametrize(("text", "shown"), [("a_b & 5 %", r"a\_b \& 5 \%"), ("\\x{}", r"\textbackslash{}x\{\}")])
def test_texts_are_shown_as_they_are(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped("é\n[x]") == r"\textbackslash{}u00e9 {[}x{]}"


def test_no_name_is_a_command() -> None:
    text = latex(ODD, board(ODD, "b"))
    assert "\\input" not in "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert text.isascii()


def beside(first: Summary) -> list[Verdict]:
    """A published value within our interval at the first setting, with an odd name, and one that was not run."""
    theirs = next(row for row in published.read("fedgen") if row.sd is not None)
    run = Verdict(theirs, "inside", ("not stated there: 100 % of it",), "fedavg", "alpha=1", first.cells[0][0])
    return [run, Verdict(replace(theirs, hyper=f"x={ODD}"), "not run", ("no trial",))]


def test_published_values_have_a_table_of_those_that_were_run() -> None:
    first = board("fedavg", settings=1)
    last = tables_of(latex("sweep", first, beside(first)))[-1]
    assert [line[0] for line in last] == ["method", "fedavg"]
    assert last[1][2:] == [r"87.70 $\pm$ 2.07", "52.00 {[}49.52, 54.48{]}", "inside"]


@pytest.mark.skipif(not ENGINES, reason="neither tectonic nor pdflatex is here")
def test_it_compiles(tmp_path: Path) -> None:
    first = board("fedavg", "kdia", ODD)
    (tmp_path / "board.tex").write_text(latex(ODD, first, beside(first)))
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{textcomp}\usepackage{booktabs}"
        r"\begin{document}\input{board}\end{document}"
    )
    options = ["-halt-on-error", "-interaction=nonstopmode"] if ENGINES[0] == "pdflatex" else []
    done = subprocess.run(
        [ENGINES[0], *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
