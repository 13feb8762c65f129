"""One HTML page of a results folder that needs nothing else: no network, no other file, no server.

`document` is what the page knows, as JSON; `_page/` holds how it looks. Text from the tables is data: it is escaped
here, and the scripts never make markup of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness import __version__, cards, durable, series
from harness.arrangement import Arrangement, arrange
from harness.record import Row, Store
from harness.refusal import Refused
from harness.scores import beside, scored, student
from harness.series import Floats, Seen, pack, short
from harness.statistics import summarise
from harness.tables import matrix
from harness.views import viewed

CONTENT = re.compile(r'<script type="application/json" id="content">(.*?)</script>', re.DOTALL)
HERE = Path(__file__).resolve().parent / "_page"
SCRIPTS = ("data.js", "charts.js", "tables.js", "sections.js", "script.js")
COSTS = ("up_bytes", "down_bytes", "steps", "server_steps", "seconds", "samples")
PLAIN = ("seed", "status", "reason", "rounds_done", "seconds", "stage")  # columns that are drawn at once
SUMMARIES = {"last10": "Last 10 rounds", "last": "Last round", "best": "Best round", "auc": "All rounds (AUC)"}


def document(
    name: str,
    trials: Sequence[Row],
    models: Mapping[str, list[Seen]],
    events: Sequence[dict[str, Any]] = (),
    deals: Sequence[Mapping[str, Any]] = (),
    baseline: str | None = None,
    thorough: bool = True,
) -> dict[str, Any]:
    """All that the page shows. models: by trial, what `series.seen` makes of its rounds; deals: see `gallery`.

    baseline: what all are compared to, see `statistics.summarise`. Raises Refused for one that there is not.
    thorough: without it only the first metric has comparisons.
    """
    plan = arrange(trials, models)
    views, metrics = viewed(plan)
    scores = scored(plan, metrics, list(metrics) if thorough else list(metrics)[:1], baseline)
    curves, blocks = _curves(plan, metrics)
    blocks |= {f"cells.{metric}": pack(score) for metric, score in scores.items()}
    published = beside([row for row in trials if row.get("stage") != "search"]) if thorough else []
    blocks |= {"events": pack(list(events)), "deals": pack(list(deals)), "published": pack(published)}
    blocks |= {name: pack(part) for name, part in _later(plan).items()}
    return {
        "name": name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "summaries": SUMMARIES,
        "student": [short(value) for value in student()[:60]],
        "views": views,
        "metrics": metrics,
        **plan.head(),
        "ranks": _ranks(plan, scores),
        "classes": _class_names({str(row["dataset"]) for row in trials}),
        "trials": _trials(plan),
        "costs": {cost: [_mean_cost(plan, at, cost) for at in range(len(plan.groups))] for cost in COSTS},
        "skew": _skew(plan),
        "curves": curves,
        "published": len(published),
        "blocks": blocks,
    }


def _later(plan: Arrangement) -> dict[str, list[Any]]:
    """What is shown of groups and trials only when it is asked for."""
    recalls = [_recall(plan, at) for at in range(len(plan.groups))]
    return {"recall": recalls, "rows": [_provenance(row) for row in plan.trials]}


def _trials(plan: Arrangement) -> dict[str, list[Any]]:
    """What is drawn of trials at once, by column."""
    return {
        "id": [row["trial_id"] for row in plan.trials],
        **{name: [_plain(row.get(name)) for row in plan.trials] for name in PLAIN},
        "search": [json.loads(row.get("search") or "null") for row in plan.trials],
        "score": [_score(row) for row in plan.trials],
    }


def html(content: Mapping[str, Any], plain: Sequence[Sequence[str]] = (), poll_s: float = 0) -> str:
    """The page. plain: the table that is shown where scripts are off, its head first; poll_s: seconds between
    questions for newer data, 0: none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = _style(), _script()
    env = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return env.get_template("template.html").render(
        style=Markup(style),  # our own files: they hold no "</"
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        content={**content, "poll": poll_s},
        plain=plain,
        live=bool(poll_s),
    )


def write(results: Path | str, baseline: str | None = None, folder: Path | str | None = None) -> Path:
    """Write leaderboard.html into a folder, by default that of the results, whole or not at all; returns its path.

    The clients' heat maps are in it where torch is loaded already, as after a sweep: a board by itself stays light.
    Raises Refused for a folder without trials, or one that can't be read or written, and as `document` does.
    """
    target, store = Path(folder or results) / "leaderboard.html", Store(results, writable=False)
    trials = store.rows("trials")
    if not trials:
        raise Refused(f"{results} has no trials yet: `fedstill sweep CARD --results {results}` makes them")
    models = series.seen(store.arrays("rounds", series.COLUMNS))
    name = Path(results).resolve().name
    content = document(name, trials, models, store.rows("events"), _deals(trials, kept_deals(target)), baseline)
    text = html(content, matrix(summarise(trials, baseline=baseline)))
    try:
        durable.write(target, text.encode())
    except OSError as problem:
        raise Refused(f"{target} can't be written: {problem.strerror or problem}") from None
    return target


def _deals(trials: Sequence[Row], kept: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if "torch" not in sys.modules:
        wanted = dict.fromkeys(str(row["partition_hash"]) for row in trials)
        return [kept[digest] for digest in wanted if digest in kept]
    from harness.gallery import deals

    return deals(trials, kept)


def kept_deals(file: Path) -> dict[str, dict[str, Any]]:
    """The heat maps of a page that was written before, by the hash of their partition."""
    try:
        found = CONTENT.search(file.read_text(encoding="utf-8"))
        deals = json.loads(series.unpack(json.loads(found[1])["blocks"]["deals"])) if found else []
        return {str(deal["hash"]): deal for deal in deals}
    except (OSError, ValueError, TypeError, LookupError):  # none, or of another version
        return {}


@lru_cache
def _style() -> str:
    return (HERE / "style.css").read_text(encoding="utf-8")


@lru_cache
def _script() -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _ranks(plan: Arrangement, scores: Mapping[str, Any]) -> list[float | None]:
    """By group: what decides which of many lines are told apart best."""
    first = next(iter(scores.values()), None)
    cells = first["last10"]["cells"] if first and "last10" in first else [None] * len(plan.groups)
    return [cell[0] if cell else None for cell in cells]


def _curves(plan: Arrangement, metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Which curves there are and at which rounds they have points; and by metric their levels."""
    names = [name for name in metrics if name in series.METRICS]
    lines = [(at, model) for at, models in enumerate(plan.models) for model in models]
    most, kept = series.points(len(lines), len(names))
    picks = [series.thin(len(model.rounds), most) for _, model in lines]
    grids: dict[tuple[int, ...], int] = {}
    places = [
        grids.setdefault(tuple((model.rounds[pick] + 1).tolist()), len(grids))
        for (_, model), pick in zip(lines, picks, strict=True)
    ]
    blocks = {}
    for name in names[:kept]:
        whole = metrics[name]["unit"] == "%"
        blocks[f"curves.{name}"] = series.pack_curves(
            {
                at: series.levels(model.values[name][picks[at]], whole)
                for at, (_, model) in enumerate(lines)
                if name in model.values
            }
        )
    head = {
        "trial": [at for at, _ in lines],
        "role": [model.role for _, model in lines],
        "grid": places,
        "grids": [list(grid) for grid in grids],
        "metrics": names[:kept],
    }
    return head, blocks


def _recall(plan: Arrangement, at: int) -> list[float | None] | None:
    """By class, of a group: mean over its finished trials."""
    lists = [one for one in plan.recalls(at) if one is not None]
    if not lists or len({len(one) for one in lists}) > 1:
        return None
    means: Floats = np.mean(lists, axis=0)
    return [short(round(100 * float(value), 2)) for value in means]


def _mean_cost(plan: Arrangement, at: int, name: str) -> float | None:
    values = [row[name] for row in plan.done(at) if row.get(name) is not None]
    return short(sum(values) / len(values)) if values else None


def _skew(plan: Arrangement) -> list[dict[str, Any]]:
    """By setting: the realised skew of its partitions, each counted once."""
    found = []
    for own in plan.by_setting():
        once = {row["partition_hash"]: row for row in own if row.get("partition_hash")}
        names = {"js": "partition_js", "classes": "partition_classes", "size_cv": "partition_size_cv"}
        spans = {
            key: [short(min(values)), short(sum(values) / len(values)), short(max(values))]
            for key, name in names.items()
            if (values := [row[name] for row in once.values() if row.get(name) is not None])
        }
        found.append({"partitions": len(once), "clients": own[0].get("clients"), **spans})
    return found


def _provenance(row: Row) -> dict[str, Any]:
    """All that a trial's row says of where it comes from; its results are on the page already."""
    headline = ("_last10", "_last", "_best", "_auc")
    kept = {key: value for key, value in row.items() if value is not None and not key.endswith(headline)}
    return {**{key: _plain(value) for key, value in kept.items()}, "config": json.loads(row.get("config") or "{}")}


def _score(row: Row) -> float | None:
    """What a search judges a trial by: its validation accuracy, of the first model that has one."""
    found = (value for name, value in row.items() if name.endswith("_validation_accuracy_last10"))
    return next((short(value) for value in found if value is not None), None)


def _plain(value: Any) -> Any:
    return short(value) if isinstance(value, float) else value


def _class_names(datasets: set[str]) -> dict[str, list[str]]:
    """By data set, where its card has them."""
    found = {}
    for name in sorted(datasets):
        with suppress(Refused):
            found[name] = list(cards.read("datasets", name).get("class_names", []))
    return found
