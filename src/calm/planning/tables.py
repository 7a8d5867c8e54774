"""A plan as tables for a terminal."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from calm.planning.memory import PARTS
from calm.planning.plan import Plan, SharingPlan, StagePlan
from calm.planning.serving import Serving
from calm.quantities import duration, short

_DAY = 24 * 60 * 60


def print_plan(plan: Plan) -> None:
    """Print a plan: memory and time of each stage, all stages together, and serving."""
    console = Console(highlight=False)
    card, speed = plan.devices.device, plan.speed
    console.print(
        f"{plan.devices}: {gigabytes(card.memory)} GB each, {gigabytes(card.usable)} of them for a run; "
        f"{card.half_flops / 1e12:,.4g} TFLOP/s in bf16, {card.single_flops / 1e12:,.4g} in fp32; "
        f"{card.bandwidth / 1e9:,.0f} GB/s; {card.watts:,.0f} W"
    )
    console.print(
        f"assumed: {speed.utilisation:.0%} of these FLOP/s in training, {speed.link / 1e9:g} GB/s between "
        "devices\n"
    )
    for stage in plan.stages:
        _print_stage(console, stage)
    console.print(
        f"all stages: {long_time(plan.seconds)}, {plan.kilowatt_hours:,.3g} kWh for the cards alone\n"
    )
    _print_serving(console, plan.serving)


def _print_stage(console: Console, stage: StagePlan) -> None:
    pace = stage.pace
    tokens = pace.steps * pace.step_tokens
    console.print(
        f"{stage.name}: {short(stage.parameters)} parameters; {pace.steps:,} steps of {pace.step_tokens:,} "
        f"tokens, {short(tokens)} in all; {pace.steps * pace.flops:.2e} FLOPs"
    )
    console.print(
        f"a device: {stage.passes} x {stage.microbatch:,} tokens a step; {stage.precision}; gradient "
        f"checkpointing {'on' if stage.is_checkpointed else 'off'}; {stage.sharing}"
    )
    console.print(_table_of(stage))


def _table_of(stage: StagePlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("GB of a device")
    for name in stage.options:
        table.add_column(name, justify="right")
    options, share = list(stage.options.values()), stage.microbatch * stage.passes

    def row(name: str, cell: Callable[[SharingPlan], str]) -> None:
        table.add_row(name, *map(cell, options))

    for part in PARTS:
        if any(part in option.parts for option in options):
            table.add_row(part, *(gigabytes(option.parts.get(part, 0)) for option in options))
    row("all", lambda option: gigabytes(sum(option.parts.values())))
    row("fits", lambda option: "yes" if option.fits else "no")
    row("largest microbatch, tokens", lambda option: _microbatch(option.largest, share))
    if options[0].largest_checkpointed is not None:
        row("with checkpointing", lambda option: _microbatch(option.largest_checkpointed or 0, share))
    table.add_section()
    for phase in options[0].pace.seconds:
        table.add_row(f"{phase}, s a step", *(f"{option.pace.seconds[phase]:.3g}" for option in options))
    row("bound by", lambda option: option.pace.bound)
    row("sent by a device, GB a step", lambda option: gigabytes(option.pace.sent))
    row("tokens a second", lambda option: short(option.pace.tokens_per_second))
    row("time", lambda option: long_time(option.pace.total_seconds))
    row("kWh", lambda option: f"{option.pace.kilowatt_hours:,.3g}")
    return table


def _microbatch(tokens: int, share: int) -> str:
    return "none" if not tokens else f"{tokens:,}{' (all)' if tokens == share else ''}"


def _print_serving(console: Console, serving: Serving) -> None:
    console.print(
        f"serving on one card, bf16, {serving.draws:g} draw{'s' * (serving.draws != 1)} a chunk: weights "
        f"{gigabytes(serving.weights)} GB; cache {short(serving.cache_per_token)}B a token, "
        f"{gigabytes(serving.cache_per_token * serving.context)} GB for a context of {serving.context:,}"
    )
    if not serving.rates:
        console.print("it does not fit.")
    for rate in serving.rates:
        console.print(
            f"{rate.rows:,} row{'s' * (rate.rows != 1)} at once: at most "
            f"{short(rate.tokens_per_second)} tokens a second, bound by {rate.bound}"
        )


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9 bytes): one decimal from 1 GB on, two significant digits below."""
    return f"{size / 1e9:,.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def long_time(seconds: float) -> str:
    """A duration, in days from two days on."""
    return duration(seconds) if seconds < 2 * _DAY else f"{seconds / _DAY:,.1f} days"
