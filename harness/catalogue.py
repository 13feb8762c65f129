"""The page of all methods, algorithms/README.md, made from their docstrings: `python -m harness.catalogue`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from harness import registry
from harness.protocol import Algorithm

SECTIONS = ("Paper", "Travels down", "Travels up", "Remembered by the client", "Differences from")
_LABEL = re.compile(rf"(?:^|(?<=\s))({'|'.join(SECTIONS)})([^:.]*):")
# A citation goes to the end of the sentence that its year is in; an arXiv number is no year.
_CITED = re.compile(r".*?\b((?:19|20)\d\d)\b(?!\.\d)(?:[^.;]|\.(?=\S))*")
HEAD = """\
# Methods

One file each; `fedstill show methods NAME` prints a method's hyper-parameters with their defaults, and the head of
its file says what differs from the paper. This page is made from those heads by `python -m harness.catalogue`.

| method | paper | year | travels down / up | needs | file |
|---|---|---|---|---|---|
"""
TAIL = """
"Needs" is what a trial has to offer, with the method's default hyper-parameters: see `Algorithm` in
[protocol.py](../harness/protocol.py). Methods that do not need `one_net` take clients with different nets.

## Add a method

1. Write a file with one frozen dataclass that derives from `Algorithm`, or from `FedAvg` to keep what it does.
2. Its fields are the hyper-parameters: a comment says the paper's symbol and where the default is from.
3. Override hooks. They are pure, get all randomness handed to them, and what they send is counted.
4. Begin the file with a sentence and the five parts below: `fedstill check` asks for them, this page shows them.
5. `fedstill check ./unsure.py` runs the conformance suite, `fedstill run ./unsure.py weight=0.1,0.5` trains with it.
6. To ship it, move it to `algorithms/`, add a test with numbers, and run `python -m harness.catalogue`.

```python
{example}```
"""
EXAMPLE = '''\
"""FedAvg whose clients are held back from being too sure of themselves.

Paper: Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, ICLR workshop 2017.
Travels down: the model. Travels up: the model. Remembered by the client: nothing.
Differences from the paper: it is applied to the clients' local training.
"""

from dataclasses import dataclass
from typing import ClassVar

from algorithms.fedavg import FedAvg
from harness.protocol import NonNegative


@dataclass(frozen=True)
class Unsure(FedAvg):
    """Cross-entropy - weight * entropy of the answers."""

    identity: ClassVar = {"weight": 0.0}  # FedAvg, bit for bit

    weight: NonNegative = 0.1  # beta, the paper's value for MNIST

    def loss(self, net, p, batch, inbox, memory):
        """Cross-entropy - weight * H, in nats."""
        value, seen = super().loss(net, p, batch, inbox, memory)
        if self.weight:
            log_q = net(p, batch.x).log_softmax(-1)
            value = value + self.weight * (log_q.exp() * log_q).sum(-1).mean()
        return value, seen
'''


def doc(method: type[Algorithm]) -> str:
    """The head of a method's file."""
    return inspect.getdoc(inspect.getmodule(method)) or ""


def needs(name: str) -> list[str]:
    """What a method needs with its default hyper-parameters, which needs may depend on."""
    return sorted(registry.make(name, {}).needs)


def sections(text: str) -> dict[str, str]:
    """The parts of a head by their labels, each on one line without its full stop; "" is the first sentence."""
    first, *rest = _LABEL.split(" ".join(text.split()))
    found = {label: body.strip().rstrip(".") for label, body in zip(rest[::3], rest[2::3], strict=True)}
    return {"": first.strip(), **found}


def citation(paper: str) -> tuple[str, str]:
    """The paper and its year; "-" for those that there are not."""
    head = paper.partition(";")[0]
    if re.match(r"none\b", head):
        return "-", "-"
    found = _CITED.match(head)
    return (found[0], found[1]) if found else (head.partition(". ")[0], "-")


def page() -> str:
    """The whole page."""
    rows = [_row(name) for name in registry.names()]
    return HEAD + "".join(rows) + TAIL.format(example=EXAMPLE)


def path() -> Path:
    """Where the page lies."""
    return Path(inspect.getfile(registry.load("fedavg"))).with_name("README.md")


def _row(name: str) -> str:
    method = registry.load(name)
    parts = sections(doc(method))
    paper, year = citation(parts.get("Paper", ""))
    down, up = parts.get("Travels down", ""), parts.get("Travels up", "")
    file = f"{name.replace('-', '_')}.py"
    cells = [
        name,
        paper,
        year,
        f"{down} / {up}",
        ", ".join(needs(name)) or "-",
        f"[{file}]({file})",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    path().write_text(page(), encoding="utf-8")
