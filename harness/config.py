"""What a trial is: its settings with their ranges, how they are resolved, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from harness import RULES_VERSION, cards, nets, registry
from harness.refusal import Refused, unknown
from harness.settings import RULES, Settings, Unfit, check, unfit

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Concentration = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Scalar: TypeAlias = bool | int | float | str | None
Kind = Literal[
    "iid",
    "dirichlet",
    "dirichlet-capped",
    "dirichlet-grouped",
    "dirichlet-client",
    "shards",
    "pathological",
    "quantity",
    "quantity-dirichlet",
]


class Partition(Settings):
    """How the training rows are dealt to the clients. A kind reads only the fields that its rule needs."""

    kind: Kind = "dirichlet"
    alpha: Concentration = 0.5  # Dirichlet concentration of the labels
    min_samples: Annotated[int, Field(ge=0, le=2**31 - 1)] = 10  # rows that every client gets at least
    shards_per_client: Count = 2
    classes_per_client: Count = 2
    size_alpha: Concentration = 0.5  # Dirichlet concentration of the clients' sizes
    group: Count = 10  # clients in a group of dirichlet-grouped
    fraction: Share = 1.0  # share of the training rows used
    long_tail: Annotated[float, Field(ge=1, le=1e6)] = 1.0  # rows of the largest class / smallest, before the deal
    shift: Literal["none", "rotation", "noise"] = "none"  # feature shift between clients
    shift_level: Annotated[float, Field(ge=0, le=360)] = 0.0  # rotation: degrees; noise: sigma

    # The kinds that read a field; fields that are not listed are read by all.
    READ_BY: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {
            "alpha": frozenset(k for k in get_args(Kind) if "dirichlet" in k),
            "shards_per_client": frozenset({"shards"}),
            "classes_per_client": frozenset({"pathological"}),
            "size_alpha": frozenset({"pathological", "quantity", "quantity-dirichlet"}),
            "group": frozenset({"dirichlet-grouped"}),
        }
    )

    def unread(self) -> frozenset[str]:
        """The fields that change nothing under this kind and shift."""
        names = {name for name, kinds in self.READ_BY.items() if self.kind not in kinds}
        return frozenset(names | ({"shift_level"} if self.shift == "none" else set()))

    def canonical(self) -> Partition:
        """The same partition with unread fields at their defaults: equal partitions get one spelling, one hash."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.unread()})


class Local(Settings):
    """The clients' optimizer (SGD) and data order: one budget for every method."""

    epochs: Count = 5
    batch: Count = 64
    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_decay: Share = 1.0  # factor per round
    augment: bool = True
    drop_last: bool = False


class Evaluation(Settings):
    """When and how models are measured on the global test set. tail: share of the classes that count as tail."""

    every: Count = 1  # rounds; the last one is always evaluated
    batch: Count = 1000
    tail: Share = 0.3
    # A TOML list becomes a tuple; its members stay strict.
    targets: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()


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
    local: Local = Local()
    evaluation: Evaluation = Evaluation()


class Execution(Settings):
    """Where and how trials run. Never part of the hash: no setting here may change a number."""

    hosts: Annotated[int, Field(ge=0, le=10**5)] = 0  # 0: train inline in the server
    cpus_per_host: Positive = 1.0
    cpus_per_server: Annotated[float, Field(ge=0)] | None = None  # None: see `server_cpus`
    gpus_per_host: Annotated[float, Field(ge=0)] = 0.0
    gpus_per_server: Annotated[float, Field(ge=0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Annotated[int, Field(ge=0, le=10**5)] = 0  # trials at once; 0: what fits
    address: Text = ""  # of a Ray cluster, or "auto"; empty: start one here
    data: Text = ""  # folder of the data sets
    mlflow: bool = True

    @property
    def server_cpus(self) -> float:
        """Cores of the server: as set, else one when it trains itself and none when hosts do."""
        return float(self.hosts == 0) if self.cpus_per_server is None else self.cpus_per_server

    @field_validator("gpus_per_host", "gpus_per_server")
    @classmethod
    def _placeable(cls, gpus: float) -> float:
        # Other fractions than 1/n can hang on several nodes (ray#20933). 0.33 is a third: three nearly fill a GPU.
        if gpus.is_integer() or (1e-4 <= gpus < 1 and gpus * int(1 / gpus + 1e-9) > 0.97):
            return gpus
        raise ValueError("must be 0, 1/n (0.5, 0.25, 0.2, ...) or a whole number of GPUs")


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
    return trial.model_copy(
        update={
            "method": method,
            "source": source,
            "hyper": _hyper(method, settings["hyper"]),
            "net": _net(trial),
            "partition": trial.partition.canonical(),
            **_cohort(trial),
        }
    )


def digest(trial: Trial) -> str:
    """sha256 (hex) of a resolved trial and the rules version: equal settings, equal digest, whatever their order.

    A method given by path counts by name and content, so that a checkout may move.
    """
    settings = trial.model_dump(mode="json")
    if trial.source:
        settings["method"] = registry.label(trial.method)
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
        source = hashlib.sha256(path.read_bytes()).hexdigest()
    except (Refused, OSError) as error:
        raise Unfit("method", str(error)) from error
    if trial.source not in ("", source):
        raise Unfit("method", f"the method file {path} is not the one of this trial any more: its content changed")
    return str(path), source


@lru_cache
def hyper_fields(method: str) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of a method's hyper-parameters; the default is MISSING where there is none."""
    algorithm = registry.load(method)
    hints = get_type_hints(algorithm, include_extras=True)
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(algorithm)  # type: ignore[arg-type]
    }
    return {name: (hints[name], default) for name, default in defaults.items()}


@lru_cache
def _adapter(method: str, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(hyper_fields(method)[name][0], config=RULES)


def _hyper(method: str, given: object) -> dict[str, Any]:
    """Every hyper-parameter of the method with its value, checked against its annotation and by the method itself."""
    label = registry.label(method)
    if not isinstance(given, Mapping):
        raise Unfit("hyper", f"hyper must be a table of {label}'s hyper-parameters, got {given!r:.80}")
    allowed = hyper_fields(method)
    for name in given:
        if name not in allowed:
            raise Unfit(f"hyper.{name}", str(unknown(f"hyper-parameter of method {label}", str(name), allowed)))
    values = {}
    for name, (annotation, default) in allowed.items():
        value = given.get(name, default)
        if value is MISSING:
            raise Unfit(f"hyper.{name}", f"method {label} needs a value for its hyper-parameter {name}")
        try:
            values[name] = _adapter(method, name).validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            what = f"{name} (hyper-parameter of method {label})"
            raise unfit(f"hyper.{name}", error.errors(include_url=False)[0], annotation, what) from error
    try:
        registry.make(method, values)
    except Refused as error:
        raise Unfit("hyper", f"method {label}: {error}") from error
    return values


def _net(trial: Trial) -> str:
    """The net's name, "auto" replaced by the data card's; refused when it cannot take the data."""
    if trial.dataset not in cards.names("datasets"):
        raise Unfit("dataset", str(unknown("dataset", trial.dataset, cards.names("datasets"))))
    card = cards.read("datasets", trial.dataset)
    name: str = card["default_net"] if trial.net == "auto" else trial.net
    if name not in nets.names():
        raise Unfit("net", str(unknown("net", name, ("auto", *nets.names()))))
    try:
        nets.build(name, tuple(card["shape"]), card["classes"])
    except Refused as error:
        raise Unfit("net", f"net {name} on {trial.dataset}: {error}") from error
    return name


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
