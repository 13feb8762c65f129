"""The sections of a trial's settings with their ranges. A setting that a section does not have is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator

from harness.settings import Settings

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
    # Domains keep clients apart before the kind deals within each: those of the data set, or the two halves of the
    # classes. Every domain gets clients in proportion to its rows.
    domains: Literal["none", "card", "halves"] = "none"

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
    clip: Annotated[float, Field(ge=0)] = 0.0  # largest norm of a step's gradient; 0: as it is
    lr_decay: Share = 1.0  # factor per round
    augment: bool = True
    drop_last: bool = False


class Proxy(Settings):
    """Data on the server, taken from the training rows before they are dealt, or from another data set."""

    source: Text = "none"  # "none", "train", or the name of a data set whose rows have the same shape
    rows: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    balanced: bool = False  # as many rows of each class, as far as there are

    @model_validator(mode="after")
    def _both(self) -> Proxy:
        if (self.source == "none") != (self.rows == 0):
            raise ValueError("proxy.source and proxy.rows go together: give both, or neither")
        return self


class Holdout(Settings):
    """Shares of every client's rows kept from training: to test its own model, and to validate."""

    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _some_left(self) -> Holdout:
        if self.test + self.validation >= 1:
            raise ValueError("holdout.test and holdout.validation together must be less than 1")
        return self


class Fleet(Settings):
    """Who can train what: levels of nets, from small to large. Without nets everybody trains the trial's net.

    by: how a client gets its level: at random, the more rows the larger, the more evenly mixed labels the larger, or
    by the domain of its rows (partition.domains).
    """

    nets: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(strict=False)] = ()  # empty: equal
    by: Literal["random", "size", "labels", "domain"] = "random"

    @model_validator(mode="after")
    def _shares_fit(self) -> Fleet:
        if len(self.nets) == 1:
            raise ValueError("fleet.nets must be two nets or more: for one net set net")
        if self.shares and (len(self.shares) != len(self.nets) or abs(sum(self.shares) - 1) > 1e-6):
            raise ValueError(f"fleet.shares must be {len(self.nets)} numbers that add up to 1, one for each net")
        return self


class Availability(Settings):
    """Who is there when a cohort is drawn, and what becomes of its work.

    pattern: uniform; weighted, by rows; cyclic, for the first `window` of every `period` rounds, in time zones spread
    over the clients; trace, exactly the clients that a Parquet file with columns round and client lists.
    """

    pattern: Literal["uniform", "weighted", "cyclic", "trace"] = "uniform"
    period: Annotated[int, Field(ge=2, le=2**31 - 1)] = 24  # rounds
    window: Share = 0.5  # share of a period
    trace: Text = ""  # path
    trace_hash: Text = ""  # sha256 of its rows, filled in
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # chance that a visit's work is lost; its bytes down count
    stragglers: Annotated[float, Field(ge=0, le=1)] = 0.0  # chance that a visit does only a part of its epochs
    straggler_work: Share = 0.5  # that part

    @model_validator(mode="after")
    def _complete(self) -> Availability:
        for name in ("period", "window"):
            if self.pattern != "cyclic" and getattr(self, name) != self._usual(name):
                raise ValueError(f"availability.{name} changes nothing unless availability.pattern = cyclic")
        if not self.stragglers and self.straggler_work != self._usual("straggler_work"):
            raise ValueError("availability.straggler_work changes nothing unless availability.stragglers is over 0")
        if (self.pattern == "trace") != bool(self.trace):
            raise ValueError("availability.pattern = trace and availability.trace = FILE go together")
        if self.trace_hash and not self.trace:
            raise ValueError("availability.trace_hash is of the file availability.trace: set that")
        return self

    def _usual(self, name: str) -> object:
        return type(self).model_fields[name].default


class Evaluation(Settings):
    """When and how models are measured on the global test set. tail: share of the classes that count as tail."""

    every: Count = 1  # rounds; the last one is always evaluated
    batch: Count = 1000
    tail: Share = 0.3
    # A TOML list becomes a tuple; its members stay strict.
    targets: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()


class Faults(Settings):
    """What becomes of a trial when something goes wrong in a visit. What is skipped is an event, never silent."""

    nonfinite: Literal["fail", "skip"] = "fail"  # an update that is not finite
    client: Literal["fail", "skip"] = "fail"  # a visit that raised, hung, or lost its host time and again
    empty_rounds: Annotated[int, Field(ge=0, le=2**31 - 1)] = 10  # in a row without an update: fails; 0: any number


class Execution(Settings):
    """Where and how trials run. Never part of the hash: no setting here may change a number."""

    hosts: Annotated[int, Field(ge=0, le=10**5)] = 0  # 0: train inline in the server
    cpus_per_host: Annotated[float, Field(ge=1e-4, le=1e6)] = 1.0
    cpus_per_server: Annotated[float, Field(ge=0, le=1e6)] | None = None  # None: see `server_cpus`
    gpus_per_host: Annotated[float, Field(ge=0)] = 0.0
    gpus_per_server: Annotated[float, Field(ge=0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Annotated[int, Field(ge=0, le=2**31 - 1)] = 25  # rounds; 0: a trial that is cut off starts over
    parallel: Annotated[int, Field(ge=0, le=10**5)] = 0  # trials at once; 0: what fits
    retries: Annotated[int, Field(ge=0, le=100)] = 1  # times that a trial whose process died is started again
    host_retries: Annotated[int, Field(ge=0, le=100)] = 3  # times that work is given again after its host died
    visit_timeout_s: Annotated[float, Field(ge=0)] = (
        1800.0  # of a visit on a host, which then counts as hung; 0: none
    )
    allow_drift: bool = False  # go on from a checkpoint of other packages, threads or device
    address: Text = ""  # of a Ray cluster, or "auto"; empty: start one here
    data: Text = ""  # folder of the data sets
    mlflow: bool = True

    @property
    def server_cpus(self) -> float:
        """Cores of the server: as set, else one when it trains itself and none when hosts do."""
        return float(self.hosts == 0) if self.cpus_per_server is None else self.cpus_per_server

    @field_validator("cpus_per_server")
    @classmethod
    def _countable(cls, cpus: float | None) -> float | None:
        if cpus and cpus < 1e-4:  # Ray counts in these
            raise ValueError("must be 0, or 0.0001 or more")
        return cpus

    @field_validator("gpus_per_host", "gpus_per_server")
    @classmethod
    def _placeable(cls, gpus: float) -> float:
        # Other fractions than 1/n can hang on several nodes (ray#20933). 0.33 is a third: three nearly fill a GPU.
        if gpus.is_integer() or (1e-4 <= gpus < 1 and gpus * int(1 / gpus + 1e-9) > 0.97):
            return gpus
        raise ValueError("must be 0, 1/n (0.5, 0.25, 0.2, ...) or a whole number of GPUs")
