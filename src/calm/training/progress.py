"""The progress bar shows the loss; each evaluation gets a line of its own."""

from typing import Any

from transformers import ProgressCallback

from calm.core.brier import NUM_ORDERS, undefined_brier_lm


class ProgressLines(ProgressCallback):
    """The Trainer's progress bar with readable numbers instead of printed dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show the loss beside the bar, and held-out scores on a line of their own."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            speed = {"tokens/s": f"{logs['tokens_per_second']:,.0f}"} if "tokens_per_second" in logs else {}
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", **speed)
        figures = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if figures:
            text = ", ".join(f"{key} {_shown(key, value, figures)}" for key, value in figures.items())
            self.training_bar.write(f"step {state.global_step}: {text}")


def _shown(key: str, value: float, figures: dict[str, float]) -> str:
    if key == "brier_lm" and not value > 0:
        orders = [figures[f"brier_{order}"] for order in range(1, NUM_ORDERS + 1)]
        return f"undefined ({undefined_brier_lm(orders)})"
    return f"{value:.4g}"
