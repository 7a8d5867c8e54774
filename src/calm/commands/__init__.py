"""The commands of the command line.

Their functions must not have the name of one that `calm` offers: jsonargparse looks a function's name up in
the package, which would import torch for each command.
"""

from collections.abc import Callable

from calm.commands.chatting import chat
from calm.commands.listing import models, recipes
from calm.commands.making import ablate, compare, demo, finetune_model, prepare_text, tasks, train_model
from calm.commands.planning import plan
from calm.commands.sharing import import_published, serve, share
from calm.commands.using import compile_steps, doctor, evaluate, flops, generate

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "prepare": prepare_text,
    "train": train_model,
    "finetune": finetune_model,
    "tasks": tasks,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "compile": compile_steps,
    "import": import_published,
    "share": share,
    "flops": flops,
    "plan": plan,
    "recipes": recipes,
    "models": models,
    "doctor": doctor,
}
