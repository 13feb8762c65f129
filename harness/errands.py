"""Tune's way to ask the desk for work."""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from harness.archive import Archive
from harness.scribe import Scribe


class Errands(Searcher):
    """Hands jobs to Tune as it has room. What is done is known from the tables, so nothing here is ever saved."""

    def __init__(self, scribe: Scribe, archive: Archive) -> None:
        super().__init__(metric="rounds_done", mode="max")
        self.scribe, self.archive = scribe, archive

    def suggest(self, trial_id: str) -> Any:
        """The next job as the settings of a Tune trial; None: not now."""
        scribe = self.scribe
        job = scribe.desk.next()
        if job is None:
            return Searcher.FINISHED if scribe.desk.over else None
        scribe.jobs[trial_id] = job
        content = scribe.ledger.content(job.name)
        if content is not None:
            self.archive.put(job.name, content)
            scribe.resumed(job)
        metric = scribe.sweep.search.how.metric if scribe.sweep.search and job.stage == "search" else ""
        cell = job.cell.model_dump_json()
        return {"cell": cell, "until": job.until, "metric": metric, "resume": content is not None}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The scribe knows already."""

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """See the class."""
