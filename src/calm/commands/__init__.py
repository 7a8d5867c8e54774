"""The commands of the command line."""

from collections.abc import Callable

from calm.commands.making import ablate, compare, demo, finetune, prepare, train
from calm.commands.using import doctor, evaluate, flops, generate, import_published, serve, share

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prepare": prepare,
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "generate": generate,
    "serve": serve,
    "import": import_published,
    "share": share,
    "flops": flops,
    "doctor": doctor,
}
