"""The page of rounds: weights with their scores, a training's progress, the effort of the cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import HTMLResponse
from filelock import Timeout
from matplotlib import rc_context
from matplotlib.figure import Figure
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.app import MONAILabelApp
from monailabel.utils.async_tasks.utils import tasks

from med3dinsight_ext.monailabel.app.answers import AnswerLog, effort
from med3dinsight_ext.monailabel.app.rounds import Training
from med3dinsight_ext.monailabel.app.versions import go_back, has_weights
from med3dinsight_ext.reports.figures import BLUE, STYLE, VERMILION
from med3dinsight_ext.reports.pages import environment

SHOWN = 200  # latest cases in the table


def rounds(trainers: dict[str, Training]) -> dict[str, dict[str, Any]]:
    """The weights that each model serves and the earlier ones."""
    return {
        name: {
            "now": trainer.versions.weights,
            "earlier": trainer.earlier.weights if has_weights(trainer.earlier.models) else None,
        }
        for name, trainer in trainers.items()
    }


def effort_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Minutes of work and clicks of each case, in the order of annotation."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    figure.set_label("Minutes of work and clicks of each case, in the order of annotation")
    panels = figure.subplots(2, 1, sharex=True)
    order = range(1, len(rows) + 1)
    panels[0].plot(order, [row["seconds"] / 60 for row in rows], "o-", color=BLUE, ms=3)
    panels[1].plot(order, [row["clicks"] for row in rows], "o-", color=VERMILION, ms=3)
    panels[0].set(ylabel="minutes", ylim=(0, None))
    panels[1].set(ylabel="clicks", xlabel="case", ylim=(0, None))
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def outcome(task: dict[str, Any]) -> str:
    """The line of a task's log that says most: of the scores, of the latest epoch, or the last."""
    lines = [str(line) for line in task.get("details") or [""]]
    marks = ("before training", "epoch ") if task["status"] in ("RUNNING", "DONE") else ()
    found = ([line for line in lines if mark in line] for mark in marks)
    return next((marked[-1] for marked in found if marked), lines[-1])


def training() -> dict[str, Any] | None:
    """The last training's task."""
    found = tasks("train")
    return found[-1] if found else None


def router(app: MONAILabelApp, trainers: dict[str, Training], log: AnswerLog) -> APIRouter:
    """GET /rounds/ (a page), GET /rounds/effort, GET /rounds/models, POST /rounds/{model}/back."""
    found = APIRouter(prefix="/rounds", tags=["Rounds"])
    may_look = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
    may_change = [Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]

    @found.get("/", dependencies=may_look, response_class=HTMLResponse)
    def page() -> str:
        rows = effort(log.events())
        done = [row for row in rows if row["saved"]]
        task = training()
        facts = {
            "Studies": app.studies,
            "Cases with a saved label": f"{app.datastore().status().get('completed', 0)}",
            "Log of answers": log.path,
        }
        with rc_context(STYLE):
            figure = effort_figure(done) if len(done) > 1 else None
            return environment.get_template("rounds.html").render(
                title="Rounds of training",
                facts=facts,
                models=rounds(trainers),
                task=task,
                running=bool(task and task["status"] in ("SUBMITTED", "RUNNING")),
                last=outcome(task) if task else "",
                progress={name: trainer.stats() for name, trainer in trainers.items()},
                rows=rows[::-1][:SHOWN],
                figure=figure,
            )

    @found.get("/effort", dependencies=may_look)
    def all_effort() -> list[dict[str, Any]]:
        return effort(log.events())

    @found.get("/models", dependencies=may_look)
    def models() -> dict[str, dict[str, Any]]:
        return rounds(trainers)

    @found.post("/{model}/back", dependencies=may_change)
    def back(model: str) -> dict[str, Any]:
        if model not in trainers:
            raise HTTPException(404, f"model must be one of {', '.join(trainers)}, got {model!r}")
        try:
            go_back(trainers[model].models)
        except Timeout as error:
            text = "weights must stay as they are during a training, got one; stop it, or wait"
            raise HTTPException(409, text) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return rounds(trainers)[model]

    return found
