"""What a trial is: its settings with their ranges, how they are resolved, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from harness import RULES_VERSION, cards, cohorts, hypers, nets, registry, schedule
from harness.hypers import hyper_fields
from harness.refusal import Refused, unknown
from harness.sections import (
    Availability,
    Count,
    Evaluation,
    Execution,
    Faults,
    Fleet,
    Holdout,
    Kind,
    Local,
    Partition,
    Proxy,
    Share,
    Text,
)
from harness.settings import Settings, Unfit, check

Scalar: TypeAlias = bool | int | float | str | None
LATER = ("faults", "schedule", "together", "precision")
__all__ = [
    "Availability",
    "Evaluation",
    "Execution",
    "Faults",
    "Fleet",
    "Holdout",
    "Kind",
    "Local",
    "Partition",
    "Proxy",
    "Trial",
    "hyper_fields",
    "resolve",
]


class Trial(Settings):
    """One cell of a sweep, completely: two trials with equal settings give equal numbers. Made by `resolve`."""

    method: Text
    source: Text = ""  # sha256 of a method file given by path; empty for shipped methods
    hyper: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)  # every hyper-parameter of the method
    dataset: Text = "digits"
    net: Text = "auto"
    clients: Annotated[int, Field(ge=1, le=10**7)] = 20
    participation: Share = 1.0
    cohort: Annotated[int, Field(ge=0, le=10**7)] = 0  # clients in a round; 0 before resolving: by participation
    rounds: Count = 50
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    partition: Partition = Partition()
    holdout: Holdout = Holdout()
    proxy: Proxy = Proxy()
    availability: Availability = Availability()
    fleet: Fleet = Fleet()
    local: Local = Local()
    together: Annotated[int, Field(ge=1, le=10**4)] = 1  # visits of a role trained at once, which rounds otherwise
    precision: Literal["float32", "bfloat16"] = "float32"  # of local training, see `harness.precision`
    evaluation: Evaluation = Evaluation()
    faults: Faults = Faults()
    schedule: Annotated[tuple[Text, ...], Field(strict=False)] = ()  # changes on the way, see `harness.schedule`

    def at(self, round: int) -> Trial:
        """The trial as it stands in a round: with all changes up to then as its settings, and without a schedule."""
        if not self.schedule:
            return self
        local, hyper = schedule.applied(self.schedule, round, self.local, self.hyper)
        return self.model_copy(update={"local": local, "hyper": hyper, "schedule": ()})


def resolve(raw: Mapping[str, Any]) -> Trial:
    """The complete trial of some settings: defaults, hyper-parameters, net and cohort filled in, all of it checked.

    raw: nested as Trial is; only "method" is needed. `resolve(trial.model_dump())` is the trial again.
    Raises Unfit, which names the key, what is allowed and what was probably meant.
    """
    if not isinstance(raw.get("method"), str):
        raise Unfit("method", f"method must be a name or a path; known: {', '.join(registry.names())}")
    settings = {"hyper": {}, **raw}
    trial = check(Trial, {k: v for k, v in settings.items() if k != "hyper"})
    method, source = _method(trial)
    hyper = hypers.complete(method, settings["hyper"])
    whole = trial.model_copy(
        update={
            "method": method,
            "source": source,
            "hyper": hyper,
            "schedule": schedule.settled(trial.schedule, trial.rounds, trial.local, method, hyper),
            "net": _net(trial),
            "partition": trial.partition.canonical(),
            "availability": _availability(trial),
            **_cohort(trial),
        }
    )
    _check_needs(whole)
    _check_domains(whole)
    return whole


def digest(trial: Trial) -> str:
    """sha256 (hex) of a resolved trial and the rules version: equal settings, equal digest, whatever their order.

    A method given by path counts by name and content, so that a checkout may move. `LATER` settings count only where
    they are set, so that the ids from before they were there hold.
    """
    settings = trial.model_dump(mode="json")
    if trial.source:
        settings["method"] = registry.label(trial.method)
    settings["availability"]["trace"] = ""  # its hash stands for it
    for name in LATER:
        if getattr(trial, name) == Trial.model_fields[name].default:
            del settings[name]
    content = {"rules": RULES_VERSION, "trial": _one_zero(settings)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def trial_id(trial: Trial) -> str:
    """The first 16 hex characters of the digest: names the trial's row, files and MLflow run."""
    return digest(trial)[:16]


def _method(trial: Trial) -> tuple[str, str]:
    """The method's name, or the absolute path of its file (workers run elsewhere), and that file's sha256."""
    try:
        registry.load(trial.method)
        if not trial.method.endswith(".py"):
            return trial.method, ""
        path = Path(trial.method).resolve()
        source = hashlib.sha256(registry.text(trial.method)).hexdigest()
    except (Refused, OSError) as error:
        raise Unfit("method", str(error)) from error
    if trial.source not in ("", source):
        raise Unfit("method", f"the method file {path} is not the one of this trial any more: its content changed")
    registry.pin(str(path), source)
    return str(path), source


def _net(trial: Trial, key: str = "net") -> str:
    """The net's name, "auto" replaced by the data card's; refused, under this key, when it cannot take the data."""
    if trial.dataset not in cards.names("datasets"):
        raise Unfit("dataset", str(unknown("dataset", trial.dataset, cards.names("datasets"))))
    auto: str = cards.read("datasets", trial.dataset)["default_net"]
    name = auto if trial.net == "auto" else trial.net
    if name not in nets.names(of=name):
        raise Unfit(key, str(unknown(f"net in {key}" if key != "net" else key, name, ("auto", *nets.names(of=name)))))
    try:
        nets.build(name, *_rows_of(trial.dataset))
    except Refused as error:
        raise Unfit(key, f"net {name} on {trial.dataset}: {error}") from error
    return name


def _availability(trial: Trial) -> Availability:
    """With the hash of the trace's rows: a trace counts by its content, so that its file may move."""
    how = trial.availability
    if not how.trace:
        return how
    try:
        _, found = cohorts.read_trace(how.trace, trial.clients)
    except Refused as error:
        raise Unfit("availability.trace", str(error)) from None
    if how.trace_hash not in ("", found):
        raise Unfit("availability.trace", f"{how.trace} is not the trace of this trial any more: its rows changed")
    return how.model_copy(update={"trace": str(Path(how.trace).resolve()), "trace_hash": found})


def _check_needs(trial: Trial) -> None:
    """What the method needs of a trial, and what the settings need of the data card."""
    label, needs = registry.label(trial.method), registry.make(trial.method, trial.hyper).needs
    if trial.proxy.source == "none" and needs & {"proxy", "labelled_proxy"}:
        raise Unfit(
            "proxy.source", f"method {label} needs data on the server: set proxy.source=train proxy.rows=1000"
        )
    if not trial.holdout.test and "private_test" in needs:
        raise Unfit("holdout.test", f"method {label} keeps a model per client: set holdout.test=0.2 to measure them")
    if not trial.holdout.validation and "validation" in needs:
        raise Unfit("holdout.validation", f"method {label} needs validation rows: set holdout.validation=0.1")
    levels = [_net(trial.model_copy(update={"net": name}), "fleet.nets") for name in trial.fleet.nets]
    if not levels and "fleet" in needs:
        raise Unfit("fleet.nets", f"method {label} needs two nets or more: set fleet.nets=[mlp,lenet5]")
    if len(set(levels)) > 1 and "one_net" in needs:
        raise Unfit("fleet.nets", f"method {label} needs one net for all clients, not {', '.join(levels)}")
    shape, classes = _rows_of(trial.dataset)
    widths = {nets.build(name, shape, classes).latent_width for name in levels}
    if len(widths) > 1 and "same_latent" in needs:
        raise Unfit("fleet.nets", f"method {label} needs nets of one latent width, not {sorted(widths)}")
    if trial.proxy.source not in ("none", "train"):
        if trial.proxy.source not in cards.names("datasets"):
            raise Unfit(
                "proxy.source", str(unknown("data set", trial.proxy.source, ["train", *cards.names("datasets")]))
            )
        if _rows_of(trial.proxy.source)[0] != shape:
            raise Unfit(
                "proxy.source", f"rows of {trial.proxy.source} do not have the shape {shape} of {trial.dataset}"
            )
        if "labelled_proxy" in needs:
            raise Unfit("proxy.source", f"method {label} needs labels of {trial.dataset}: set proxy.source=train")


def _check_domains(trial: Trial) -> None:
    """What only some data can do: domains of their own; for images a feature shift and proxy rows of another set."""
    how, name = trial.partition, trial.dataset
    if how.domains == "card" and not cards.read("datasets", name).get("domains"):
        raise Unfit("partition.domains", f"{name} has no domains of its own: set partition.domains=halves, or none")
    if trial.fleet.by == "domain" and how.domains == "none":
        raise Unfit("fleet.by", "fleet.by = domain needs domains: set partition.domains=card, or halves")
    if len(_rows_of(name)[0]) > 1:
        return
    if how.shift != "none":
        raise Unfit("partition.shift", f"{name} is text: partition.shift = {how.shift} is for images")
    if trial.proxy.source not in ("none", "train", name):
        raise Unfit(
            "proxy.source", f"{trial.proxy.source} has another vocabulary than {name}: set proxy.source=train"
        )


def _rows_of(dataset: str) -> tuple[tuple[int, ...], int]:
    """Shape and classes of a data set."""
    card = cards.read("datasets", dataset)
    return tuple(card["shape"]), card["classes"]


def _cohort(trial: Trial) -> dict[str, Any]:
    """Participation and cohort size, each from the other. A cohort is at least one client."""
    share, clients, cohort = trial.participation, trial.clients, trial.cohort
    # 100 * 0.29 is 28.999999999999996: the small number keeps the client that the user counted.
    counted = max(1, int(clients * share + 1e-9))
    if not cohort:
        return {"cohort": counted}
    if cohort > clients:
        raise Unfit("cohort", f"cohort must be at most the {clients} clients there are, got {cohort}")
    if "participation" not in trial.model_fields_set:
        return {"participation": cohort / clients}
    if cohort != counted:
        raise Unfit(
            "cohort",
            f"participation {share} of {clients} clients is {counted}, but cohort is {cohort}: give one of them",
        )
    return {}


def _one_zero(value: Any) -> Any:
    """The same JSON value with -0.0 spelled 0.0."""
    if isinstance(value, dict):
        return {key: _one_zero(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_one_zero(member) for member in value]
    return value + 0.0 if isinstance(value, float) else value
