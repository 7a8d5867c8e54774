"""The thoughts that requests may ask for (`calm.models.thoughts`)."""

from transformers import PreTrainedConfig

from calm.models.thoughts import Thoughts, thoughts_for, thoughts_of
from calm.serving.errors import ApiError


def thoughts_of_request(config: PreTrainedConfig, number: int | None, max_thoughts: int) -> Thoughts | None:
    """The thoughts after a prompt, if any.

    Args:
        config: The model's configuration.
        number: Thoughts that a request asks for; None for as many as the model was trained with.
        max_thoughts: Maximum thoughts that the server allows.

    Raises:
        ApiError: If there are too many, or the model was not trained to think.
    """
    trained = thoughts_of(config)
    if trained is None:
        if number:
            raise ApiError(
                f"this model was not trained to think, so 'num_thoughts' cannot be {number}; leave it out.",
                param="num_thoughts",
                code="unsupported_parameter",
            )
        return None
    if (trained.number if number is None else number) > max_thoughts:
        raise ApiError(f"'num_thoughts' must be at most {max_thoughts}.", param="num_thoughts")
    try:
        return thoughts_for(config, number)
    except ValueError as error:  # The server allows more than any model can take.
        raise ApiError(str(error), param="num_thoughts") from error


def check_effort(effort: object, thoughts: Thoughts | None) -> None:
    """Raise ApiError if 'reasoning_effort' asks for no thoughts, but the model takes some.

    Args:
        effort: The value of the field.
        thoughts: The thoughts after the prompt, if any.
    """
    if effort == "none" and thoughts is not None:
        raise ApiError(
            "'reasoning_effort' is \"none\", but this model thinks; send 'num_thoughts': 0 as well.",
            param="reasoning_effort",
        )
