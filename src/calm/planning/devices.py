"""Accelerator cards, by name or by their figures."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any

from calm.errors import InputError, shown
from calm.ranges import Range

USABLE = 0.92
"""Share of a card's memory that a run can use: the rest is for the CUDA context, buffers of NCCL and cuBLAS,
and fragmentation of torch's allocator. An assumption."""
COUNTS = Range(1, 100_000)
FIGURES = Range(0, 10**9, includes_low=False)


@dataclass(frozen=True)
class Device:
    """One card.

    Args:
        name: Its name.
        memory: Its memory in bytes.
        half_flops: FLOPs per second of dense bfloat16 matrix products, accumulated in float32.
        single_flops: The same for float32 (not TF32, which torch does not use by default).
        bandwidth: Memory bandwidth in bytes per second.
        watts: Power at full load.
    """

    name: str
    memory: float
    half_flops: float
    single_flops: float
    bandwidth: float
    watts: float

    @property
    def usable(self) -> float:
        """Bytes of memory that a run can use."""
        return USABLE * self.memory

    def flops(self, precision: str) -> float:
        """FLOPs per second in a recipe's precision, "fp32" or "bf16"."""
        return self.half_flops if precision == "bf16" else self.single_flops


@dataclass(frozen=True)
class Devices:
    """Several identical cards, with one process each.

    Args:
        count: Number of cards.
        device: The card.
    """

    count: int
    device: Device

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def _card(
    name: str, gigabytes: float, bf16: float, fp32: float, bandwidth: float, watts: float
) -> tuple[str, Device]:
    """A row of the table, from GB (10^9 bytes), TFLOP/s in bf16 and fp32, GB/s, and W."""
    return name, Device(name, gigabytes * 1e9, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, watts)


# If there are several variants, SXM or OAM. FLOP/s are dense; figures published only "with sparsity" are
# halved. A maker's GB are taken as 10^9 bytes; drivers show a little more.
CARDS: dict[str, Device] = dict(
    [
        # NVIDIA A100 Tensor Core GPU, datasheet (2022).
        _card("A100-40", 40, 312, 19.5, 1555, 400),
        _card("A100-80", 80, 312, 19.5, 2039, 400),
        # NVIDIA H100 Tensor Core GPU, datasheet (2023), H100 SXM.
        _card("H100", 80, 989.4, 67, 3350, 700),
        # NVIDIA H200 Tensor Core GPU, datasheet (2024), H200 SXM.
        _card("H200", 141, 989.4, 67, 4800, 700),
        # NVIDIA Blackwell Architecture, technical brief (2024), HGX B200; memory: DGX B200, datasheet.
        _card("B200", 180, 2250, 80, 8000, 1000),
        # NVIDIA L4 Tensor Core GPU, datasheet (2023).
        _card("L4", 24, 121, 30.3, 300, 72),
        # NVIDIA L40S GPU, datasheet (2023).
        _card("L40S", 48, 362, 91.6, 864, 350),
        # NVIDIA Ada GPU Architecture, whitepaper (2022), appendix A.
        _card("RTX-4090", 24, 165.2, 82.6, 1008, 450),
        # NVIDIA Ampere GA102 GPU Architecture, whitepaper (2021), appendix A.
        _card("RTX-3090", 24, 71, 35.6, 936, 350),
        # AMD Instinct MI300X Accelerator, data sheet (2023).
        _card("MI300X", 192, 1307.4, 163.4, 5300, 750),
    ]
)


@dataclass(frozen=True)
class CardFigures:
    """The figures of a card, or those that override the table's; None for those not given.

    Args:
        memory: Memory in GiB.
        flops: TFLOP/s in the recipe's precision.
        bandwidth: Memory bandwidth in GB/s.
        watts: Power in W.
    """

    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            FIGURES.require(name, value)

    def given(self) -> dict[str, float]:
        """The figures that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def apply_to(self, device: Device) -> Device:
        """A card with these figures in place of its own."""
        given = self.given()
        units = {"memory": 2**30, "bandwidth": 1e9, "watts": 1}
        changes: dict[str, Any] = {name: given[name] * unit for name, unit in units.items() if name in given}
        if self.flops is not None:
            changes |= {"half_flops": self.flops * 1e12, "single_flops": self.flops * 1e12}
        return dataclasses.replace(device, **changes)


def devices_of(text: str, figures: CardFigures) -> Devices:
    """Parse the devices that the user names.

    Args:
        text: "8xH100", "H100", or a count of cards whose figures are given.
        figures: The figures; those of a named card are overridden.

    Raises:
        InputError: If there is no such card, or figures are missing.
    """
    match = re.fullmatch(r"\s*(?:(-?\d+)\s*(?:[x*]\s*|$))?(.*?)\s*", text, re.IGNORECASE)
    count, name = (match[1], match[2]) if match else (None, text)
    number = 1 if count is None else int(count)
    COUNTS.require("the number of devices", number)
    if name:
        return Devices(number, figures.apply_to(_find_card(name)))
    if count is None:
        raise InputError(
            f"--devices takes a count and a card, such as 8xH100, or a count; got {shown(text)}."
        )
    missing = [f"--{name}" for name in dataclasses.asdict(figures) if name not in figures.given()]
    if missing:
        raise InputError(
            f"--devices {count} names no card: add {', '.join(missing)}, or one of {', '.join(CARDS)} as in "
            f"{count}xH100."
        )
    return Devices(number, figures.apply_to(Device("card in numbers", 0, 0, 0, 0, 0)))


def _find_card(name: str) -> Device:
    cards = {_normalized(known): device for known, device in CARDS.items()}
    if (device := cards.get(_normalized(name))) is not None:
        return device
    similar = difflib.get_close_matches(_normalized(name), cards, n=1)
    hint = f"; did you mean '{cards[similar[0]].name}'?" if similar else "."
    raise InputError(
        f"there is no card {shown(name)}; use one of {', '.join(CARDS)}, or describe it with --memory, "
        f"--flops, --bandwidth and --watts{hint}"
    )


def _normalized(name: str) -> str:
    """A name without differences of spelling: RTX 4090, rtx-4090; A100-80GB, A100 80."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removesuffix("gb")
