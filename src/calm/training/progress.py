"""Progress bar of a stage, with loss and speed; each evaluation is printed on a line of its own."""

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from calm.core.brier import NUM_ORDERS, undefined_brier_lm
from calm.progress import announce, progress_bar


class StageProgress(TrainerCallback):
    """A progress bar over the steps of a stage, in place of the Trainer's.

    Args:
        name: What is trained.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the checkpoint's step if there is one."""
        self._bar = progress_bar(
            f"training {self._name}", state.max_steps, "step", done=state.global_step, stays=True
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show the loss next to the bar, and held-out scores on a line of their own."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs and self._bar is not None:
            speed = {"tokens/s": f"{logs['tokens_per_second']:,.0f}"} if "tokens_per_second" in logs else {}
            self._bar.set_postfix(loss=f"{logs['loss']:.4g}", **speed)
        scores = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        if scores:
            text = ", ".join(f"{name} {_formatted(name, scores)}" for name in scores)
            announce(f"{self._name}, step {state.global_step:,}: {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar, which stays on the terminal."""
        self.close()

    def close(self) -> None:
        """Close the bar, if it is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _formatted(name: str, scores: dict[str, float]) -> str:
    if name == "brier_lm" and not scores[name] > 0:
        orders = [scores[f"brier_{order}"] for order in range(1, NUM_ORDERS + 1)]
        return f"undefined ({undefined_brier_lm(orders)})"
    return f"{scores[name]:.4g}"
