"""Everything the closing table and the report show of a finished search."""

from __future__ import annotations

import platform
from importlib.metadata import version

from autoprune.core.budget import Budget
from autoprune.core.choices import Choice, Dense
from autoprune.core.front import Front, FrontPoint
from autoprune.core.goal import GoalKind
from autoprune.core.policy import Policy, PolicyFile, model_fingerprint
from autoprune.core.result import FidelityPoint, LayerRow, Result, Row, TrialRow
from autoprune.envs.problem import Assignment
from autoprune.kernels.convert import DeployedModel
from autoprune.lut.left_out import left_out
from autoprune.lut.measure import peak_gflops
from autoprune.lut.table import LatencyTable
from autoprune.search.context import Context
from autoprune.search.deploy import layer_times_us
from autoprune.search.elsewhere import Undeployed
from autoprune.search.finals import Candidate, Finals, meets, predicted_cost
from autoprune.search.front import non_dominated
from autoprune.search.study import Study
from autoprune.search_spaces.grouped import split_choices
from autoprune.search_spaces.space import SearchSpace


def rows_of(candidates: list[Candidate], feasible: list[bool | None]) -> list[Row]:
    """Return the closing table's rows, in order."""
    return [
        Row(
            name=candidate.name,
            proposer=candidate.proposer,
            predicted=candidate.predicted,
            measured=candidate.measured,
            accuracy=candidate.accuracy,
            feasible=met,
            choices={name: choice.text for name, choice in candidate.choices.items()},
        )
        for candidate, met in zip(candidates, feasible, strict=True)
    ]


def layer_rows(
    space: SearchSpace, chosen: Candidate, network: DeployedModel, table: LatencyTable, threads: int
) -> list[LayerRow]:
    """Return what became of each layer: predicted, measured inside the network, floor, and why."""
    smaller = space.coupling.resized(space.layers, chosen.choices)
    decisions = {layer: (kernel, why) for layer, _, kernel, why in network.explain()}
    measured = layer_times_us(network)
    slope = table.calibration.slope if table.calibration else 1.0
    here = not isinstance(network, Undeployed)
    macs_a_us = peak_gflops(threads) * 1e3 / 2.0 if here else 0.0
    rows = []
    for layer, own in zip(space.layers, smaller, strict=True):
        choice = chosen.choices.get(layer.name, Dense())
        kernel, why = decisions.get(layer.name, ("torch", "not part of the plan"))
        deployed: Choice = Dense() if kernel in ("dense", "torch") else choice
        row = table.row(own, deployed)
        floor_us = own.macs * table.context.batch * deployed.density(own) / macs_a_us if here else 0.0
        rows.append(
            LayerRow(
                name=layer.name,
                shape=layer.signature,
                choice=choice.text,
                kernel=kernel,
                density=own.weights / layer.weights if own != layer else choice.density(layer),
                dense_us=slope * layer.calls * table.layer_us(layer, Dense()),
                predicted_us=slope * layer.calls * table.layer_us(own, deployed),
                measured_us=measured.get(layer.name),
                floor_us=layer.calls * row.floor_us if row.floor_us is not None else floor_us,
                model_us=None if row.model_us is None else layer.calls * row.model_us,
                why=why,
            )
        )
    return rows


def trial_rows(study: Study, space: SearchSpace, table: LatencyTable) -> list[TrialRow]:
    """Return every evaluated policy with its predicted latency."""

    def latency_us(assignment: Assignment) -> float:
        choices = study.problem.named(assignment)
        return table.network_us(space.coupling.resized(space.layers, choices), split_choices(choices))

    return [
        TrialRow(
            number=trial.number,
            proposer=trial.proposer,
            error=trial.quality.error,
            accuracy=trial.quality.accuracy,
            latency_us=latency_us(trial.assignment),
            seconds=trial.quality.seconds,
        )
        for trial in study.trials
    ]


def fidelity_points(table: LatencyTable) -> list[FidelityPoint]:
    """Return prediction and measurement of the networks the calibration was fitted on."""
    fit = table.calibration
    if fit is None:
        return []
    return [
        FidelityPoint(predicted_us=fit.slope * point.rows_us + fit.intercept_us, measured_us=point.measured_us)
        for point in fit.points
    ]


def latency_limit_us(budget: Budget, dense_us: float) -> float | None:
    """Return the latency budget in microseconds, if there is one."""
    limit = budget.limit("latency")
    return None if limit is None else limit.absolute(dense_us)


def make_result(
    context: Context, finals: Finals, rows: list[Candidate], network: DeployedModel, study: Study
) -> Result:
    """Return everything about the finished search; ``rows`` hold dense, the chosen policy, then the baselines."""
    config, deployer = context.config, finals.deployer
    table, references = deployer.table, deployer.references
    fit = table.calibration
    assert fit is not None
    chosen = rows[1]
    goal = context.goal
    feasible: list[bool | None] = [
        None,
        *(
            meets(goal.budget, row.cost) and goal.shortfall(row.accuracy.tuned, rows[0].accuracy.dense) == 0.0
            for row in rows[1:]
        ),
    ]
    met = bool(feasible[1])
    how = "measured" if deployer.measures else "predicted"
    trial = next(t for t in study.trials if study.problem.named(t.assignment) == dict(chosen.choices))
    facts = table_facts(table)
    return Result(
        model=context.task.model_name,
        data=context.task.name,
        budget=goal.text,
        goal=goal.kind,
        agent=config.agent,
        seed=config.seed,
        met=met,
        rows=rows_of(rows, feasible),
        layers=layer_rows(context.space, chosen, network, table, config.threads),
        references=references.medians_us,
        absent_references=references.absent,
        trials=trial_rows(study, context.space, table),
        fidelity=fidelity_points(table),
        fidelity_mape=fit.mape,
        fidelity_kendall_tau=fit.kendall_tau,
        seconds=context.clock.seconds,
        context={**facts, **package_versions()},
        latency_limit_us=latency_limit_us(context.budget, references.best_us),
        chosen_trial=trial.number,
        run=config.name,
        reason="" if met else _reason(goal.kind, how),
        predicted_for="" if deployer.measures else table.context.place,
        left_out=left_out(table),
        metric=context.task.scored_by,
    )


def _reason(kind: GoalKind, how: str) -> str:
    kept = "the accuracy on the validation data" if kind == "constraint" else f"the budget as {how}"
    return f"no finalist kept {kept}; the nearest one is shown"


def table_facts(table: LatencyTable) -> dict[str, str | int | float]:
    """Return the flat fields of a table's context."""
    return {key: value for key, value in table.context.model_dump().items() if isinstance(value, str | int | float)}


def save_front(context: Context, finals: Finals, study: Study) -> None:
    """Write every policy of the study that no other undercuts in error and the costs in question."""
    points = [
        FrontPoint(
            trial=trial.number,
            proposer=trial.proposer,
            error=trial.quality.error,
            accuracy=trial.quality.accuracy,
            costs=trial.costs,
            predicted=predicted_cost(context.layers, choices, finals.deployer, context.space.coupling),
            choices={name: choice.text for name, choice in choices.items()},
        )
        for trial in non_dominated(study.trials)
        for choices in [study.problem.named(trial.assignment)]
    ]
    kinds = [constraint.kind for constraint in study.problem.constraints]
    Front(objectives=["accuracy", *kinds], points=points).save(context.run.front)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    packages = ("torch", "numba", "onnxruntime", "optuna", "stable-baselines3")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def make_policy(context: Context, finals: Finals, chosen: Candidate, study: Study) -> Policy:
    """Return the chosen policy with its provenance."""
    table = finals.deployer.table
    facts = table.context.model_dump()
    record = PolicyFile(
        model=context.task.model_name,
        model_fingerprint=model_fingerprint(context.layers),
        space=context.space.fingerprint,
        table=table.hash,
        budget=context.goal.text,
        choices={name: choice.text for name, choice in chosen.choices.items()},
        predicted=chosen.predicted,
        measured=chosen.measured,
        accuracy=chosen.accuracy,
        metric=context.task.scored_by,
        splits=context.splits,
        context={key: value for key, value in facts.items() if isinstance(value, str | int | float)},
        seed=context.config.seed,
        versions=package_versions(),
        trials=len(study.trials),
        seconds=sum(context.clock.seconds.values()),
    )
    return Policy(dict(chosen.choices), record)
